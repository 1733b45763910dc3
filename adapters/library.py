"""The library of adapters: registry, store, leases and slots, kept in step.

Every operation either happened, and is on the disk, or changed nothing.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from adapters.collector import Collector
from adapters.conditions import UNCONDITIONAL, Condition
from adapters.errors import (
    Damaged,
    Invalid,
    NameConflict,
    NoEffect,
    TrunklineError,
)
from adapters.format import AdapterSet
from adapters.leases import Lease, LeaseBook
from adapters.listing import Wanted, page_by_count
from adapters.names import check_name
from adapters.opening import open_folder
from adapters.probe import Probe
from adapters.residency import Residency, use_of
from adapters.seeds import Seed, Unusable, printable, seeds_in
from adapters.slots import SlotPool
from adapters.store import Incoming, digest_of
from adapters.usage import Usage, UsageBook
from adapters.validate import MAX_RANK, validate
from adapters.version_pages import Listed, listed, within_a_page
from adapters.versions import Record, Version
from model.checkpoint import Backbone
from model.encoder import Encoder
from model.heads import TrunkHeads

log = logging.getLogger("trunkline.adapters")


@dataclass(frozen=True)
class Upload:
    """What an upload asks for besides its bytes."""

    name: str
    who: str
    activate: bool = True
    allow_zero: bool = False
    condition: Condition = UNCONDITIONAL
    patterns: Sequence[str] = ()  # of the names of the API key, if it is limited to some


class Library:
    """One data folder, of one backbone, used by one process.

    Raises InUse where another process has the folder.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        encoder: Encoder,
        slots: Callable[[Callable[[str], AdapterSet]], SlotPool],
        *,
        quota: int = 0,
        max_rank: int = MAX_RANK,
        reserve_bytes: int = 0,
    ) -> None:
        self.backbone, self.encoder, self.max_rank = backbone, encoder, max_rank
        self._probe = Probe(encoder, TrunkHeads.of(backbone.tensors, encoder.device))
        self._folder = open_folder(folder, quota, reserve_bytes)
        self.store, self.registry = self._folder.store, self._folder.registry
        self.disk, self.reserve = self._folder.disk, self._folder.reserve
        self.leases = LeaseBook()
        self._collector = Collector(self.registry, self.store, self.leases.of_digest)
        self.slots = slots(self._read)
        self._housekeeper = ThreadPoolExecutor(1, "housekeeper")
        self._usage = UsageBook()
        self.unusable: list[Unusable] = []  # files that seed() could not publish
        self._uncollected: set[str] = set()  # digests whose file or row could not be freed yet
        for digest in self.registry.unused():
            self._collect_soon(digest)  # deletes that a stop cut off
        self.residency = Residency(self.registry, self.store, self.slots, self.leases)
        self.disk.watch(self._collect_again)

    def _read(self, digest: str) -> AdapterSet:
        try:
            return self.store.read(digest)
        except Damaged:
            try:
                self._put_away_if_damaged(digest)
            except TrunklineError:
                log.warning("%s is damaged, and the registry can't be told so", digest)
            raise

    def _put_away_if_damaged(self, digest: str) -> None:
        """Looks again within a transaction: an upload may have brought a sound file meanwhile."""
        with self.registry.writing() as connection:
            if self.store.is_damaged(digest):
                self.registry.note_damage(connection, [digest], True)
                self.store.quarantine(self.store.path(digest))

    def verify(self, digest: str) -> str | None:
        """What is wrong with the file of `digest`, hashed again, or None.

        A sound file that the registry calls damaged is served again.
        """
        fault = self.store.verify(digest)
        if fault is None and digest in self.registry.damaged():
            self.registry.set_damaged([digest], False)
            self.slots.forgive(digest)
        return fault

    def close(self) -> None:
        self.disk.close()
        self._housekeeper.shutdown()
        self.slots.close()
        self._folder.close()

    # Inference.

    def version(self, reference: str) -> Version:
        """The version a reference means now. Raises as Registry.resolve."""
        return self.registry.resolve(reference)

    def lease(self, reference: str, key: str = "") -> tuple[Version, Lease]:
        """The version a reference means, and a lease on it. Raises as Registry.resolve.

        Its load, on the account of the API key, begins where it is not resident.
        """
        version, lease = self.residency.lease(reference, key)
        self._usage.count(version.name)
        return version, lease

    def usage(self, name: str) -> Usage:
        return self._usage.of(name)

    def page(self, wanted: Wanted) -> tuple[list[Listed], str | None]:
        """A page of the list and the cursor of the next, None at the end. Raises BadCursor."""
        more = replace(wanted, limit=wanted.limit + 1)
        rows = self.registry.rows_of_page(more)
        if wanted.sort in ("used", "requests"):
            counts = self._usage.values(of_last_use=wanted.sort == "used")
            rows = page_by_count([name for name, _ in rows], counts, more)
        names = within_a_page(self.registry.rows, [name for name, _ in rows[: wanted.limit]])
        shown = rows[: len(names)]
        cursor = wanted.cursor(shown[-1][1], shown[-1][0]) if len(rows) > len(shown) else None
        return listed(self.registry.rows, names), cursor

    # Administration. These wait for the disk; none is to be called on the event loop.

    def check_upload(self, upload: Upload) -> None:
        """What can be refused before the body is read. Raises BadName, NameConflict, Conflict."""
        if upload.name != upload.name.lower() and self.registry.exists(upload.name.lower()):
            raise NameConflict("a name that differs by case only is taken")
        check_name(upload.name)
        if upload.name == self.backbone.id and not self.registry.exists(upload.name):
            raise NameConflict("this is the backbone's id, which names the backbone alone")
        self.registry.check_condition(upload.name, upload.condition)

    def publish(self, upload: Upload, incoming: Incoming) -> tuple[Version, bool]:
        """Validate, probe, store and name what was uploaded; the version, and whether it is new.

        Raises BadName, Conflict, Invalid, NoEffect, PoolFull, StorageFull or ReadOnly, and then
        nothing is stored. `incoming` is the caller's to discard.
        """
        self.check_upload(upload)
        record = self._examine(upload, incoming.read())
        incoming.sync()
        previous = self._current_digest(upload.name)
        sound = self.store.look_at(incoming.digest)
        try:
            with self.registry.writing() as connection:
                self.registry.check_condition(upload.name, upload.condition)
                stored_bytes = self.registry.stored_bytes()
                if upload.patterns:
                    own = self.registry.bytes_of(upload.patterns, but=incoming.digest)
                    self.store.check_share(own + incoming.bytes, stored_bytes)
                blob = self.store.publish(incoming, stored_bytes, sound)
                number, is_new = self.registry.add(
                    connection, upload.name, blob, record, upload.who, upload.activate
                )
                version = self.registry.read(f"{upload.name}@{number}")
        except BaseException:
            if incoming.is_in_doubt:
                self._take_back(incoming)
            raise
        incoming.settle()
        self.slots.forgive(blob.digest)
        if upload.activate and previous:  # so that a swap costs no request a load
            self.slots.succeed(previous, blob.digest, use_of(version))
        return version, is_new

    def _examine(self, upload: Upload, adapter: AdapterSet) -> Record:
        manifest = validate(
            adapter,
            self.backbone.config,
            self.backbone.digest,
            self.encoder.dtype,
            self.max_rank,
        )
        self.slots.check_size(adapter)
        delta = self._probe.delta(adapter)
        read_off_only = manifest.labels or manifest.calibration  # the probe does not show these
        if delta == 0 and not read_off_only and not upload.allow_zero:
            raise NoEffect(
                "the adapter changes nothing: is every B zero? (allow_zero=true takes it)"
            )
        return Record(manifest, adapter.metadata, delta)

    def _current_digest(self, name: str) -> str | None:
        if not self.registry.exists(name):
            return None
        current = self.registry.named(name).current
        return current.digest if current else None

    def _take_back(self, incoming: Incoming) -> None:
        try:
            self._collector.take_back(incoming)
            incoming.settle()
        except Exception as error:  # whatever it is: the error that came first is raised
            log.warning("%s stays in the store until the next start: %s", incoming.digest, error)

    def remove(
        self, name: str, number: int | None, who: str, condition: Condition = UNCONDITIONAL
    ) -> int:
        """Unpublish a name or one version of it at once; how many requests still use it.

        Its memory and its file are freed when the last of them is answered.
        """
        tombstone = partial(self.registry.remove, name, number, who, condition)
        removed = self.reserve.spend(tombstone)
        if not self.registry.exists(name):
            self._usage.forget(name)
        in_flight = self.residency.forget(removed)
        for digest in {version.digest for version in removed}:
            self.leases.when_drained(digest, partial(self._collect_soon, digest))
        if not in_flight:
            self._housekeeper.submit(lambda: None).result()  # it has collected what was before
        return in_flight

    def _collect_soon(self, digest: str) -> None:
        # The last lease is released by the device thread, which is not to wait for the disk.
        self._housekeeper.submit(self._collect, digest)

    def _collect(self, digest: str) -> None:
        """Free slot and file of a digest that no live version names."""
        try:
            if not self.reserve.spend(partial(self._collector.collect, digest)):
                return
        except Exception as error:  # on the housekeeper's thread, whose errors nobody awaits
            expected = isinstance(error, TrunklineError)
            sentence = "%s stays on the disk until it can be deleted: %s"
            log.warning(sentence, digest, error, exc_info=not expected)
            self._uncollected.add(digest)
        self.slots.evict(digest)
        if not self.reserve.whole:
            self.disk.wake()

    def _collect_again(self) -> None:
        """What a disk without writes kept from being freed. Runs on the disk's thread."""
        while self._uncollected:
            digest = self._uncollected.pop()
            self._collect(digest)
            if digest in self._uncollected:
                return

    def load(self, reference: str, timeout_s: float, key: str = "") -> tuple[Version, bool]:
        """As Residency.load."""
        return self.residency.load(reference, timeout_s, key)

    def unload(self, reference: str, who: str) -> tuple[Version, int]:
        """As Residency.unload; on a full disk too: it relieves the server."""
        return self.reserve.spend(partial(self.residency.unload, reference, who))

    def pin(self, reference: str, who: str, key: str = "") -> Version:
        """As Residency.pin."""
        return self.residency.pin(reference, who, key)

    def unpin(self, reference: str, who: str) -> Version:
        """As Residency.unpin; on a full disk too."""
        return self.reserve.spend(partial(self.residency.unpin, reference, who))

    def seed(self, folder: Path) -> None:
        """Publish the files of a folder, under their paths in it, that were never published.

        What was deleted or rolled back since stays so. A file that can't be published is logged
        and is in `unusable`; it does not keep the others from being served.
        """
        faults = [self._seed(seed, folder) for seed in seeds_in(folder)]
        self.unusable = [fault for fault in faults if fault is not None]

    def _seed(self, seed: Seed, folder: Path) -> Unusable | None:
        file = printable(str(seed.path.relative_to(folder)))
        try:
            check_name(seed.name)
            self._publish_seed(seed, file)
            return None
        except (TrunklineError, OSError) as error:
            message = getattr(error, "message", None) or getattr(error, "strerror", None)
            reason = "unreadable" if isinstance(error, OSError) else error.code
            if isinstance(error, Invalid):
                reason = error.details["reason"]
            message = str(message or error)
            log.warning("%s in %s can't be served (%s): %s", file, folder, reason, message)
            return Unusable(file, printable(seed.name), reason, message)

    def _publish_seed(self, seed: Seed, file: str) -> None:
        data = seed.read()
        digest = digest_of(data)
        if not self.registry.knows(seed.name, digest):  # before a byte is written
            incoming = self.store.incoming()
            try:
                incoming.write(data)
                self.publish(Upload(seed.name, who=f"file {file}"), incoming)
            finally:
                incoming.discard()
        if self.disk.fault is None:
            self.registry.saw_file(seed.name, digest)
