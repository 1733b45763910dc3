"""The start: registry and files are held against each other. Nothing published is deleted."""

import logging

from adapters.errors import TrunklineError
from adapters.inventory import Inventory, take_inventory
from adapters.registry import Registry
from adapters.registry_file import demand_no_unknown
from adapters.store import BlobStore

log = logging.getLogger("trunkline.adapters")


def reconcile(store: BlobStore, registry: Registry) -> None:
    """Put away uploads that a stop cut off, and record which files are damaged or sound again.

    Raises RegistryLost, with nothing changed, for a file that the registry should know.
    """
    known, suspected = registry.blobs(), registry.damaged()
    found = take_inventory(store, known, suspected)
    demand_no_unknown(registry.path, found.unnamed)
    _put_away(store, found)
    store.clear_incoming()
    _record_damage(registry, found, suspected)


def _put_away(store: BlobStore, found: Inventory) -> None:
    reasons = dict.fromkeys(found.unnamed.unacknowledged, "an upload that was not acknowledged")
    reasons |= dict.fromkeys(found.unnamed.foreign, "not an adapter file")
    for path, reason in reasons.items():
        done = "was put into" if store.quarantine(path) else "can't be put into"
        log.warning("%s (%s) %s %s", path, reason, done, store.quarantine_folder)
    for digest, why in found.unreadable.items():
        log.warning("the file of %s can't be read now (%s); it stays", digest, why)


def _record_damage(registry: Registry, found: Inventory, suspected: set[str]) -> None:
    unused = set(registry.unused())  # a delete ended but for its commit: no damage
    damaged = {digest: why for digest, why in found.damaged.items() if digest not in unused}
    for digest, why in sorted(damaged.items()):
        log.warning("the file of %s is damaged: %s", digest, why)
    mended = suspected & found.sound
    if mended:
        log.info("%d files that were damaged are sound again", len(mended))
    try:
        with registry.writing() as connection:
            registry.note_damage(connection, set(damaged) - suspected, True)
            registry.note_damage(connection, mended, False)
    except TrunklineError:
        log.warning("which files are damaged can't be recorded now")
