"""Residency: what a version of a name has in the slots; requests' leases, loads, unloads and pins.

Slots are by digest, so that the same bytes are resident once. What is answered and what may be
taken away is by version: nobody sees or ends another name's use of the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from adapters.errors import Invalid
from adapters.format import read_header
from adapters.leases import Lease, LeaseBook
from adapters.pin_table import PinTable
from adapters.pins import Limit, Pins
from adapters.registry import Registry
from adapters.slot import Use
from adapters.slots import SlotPool
from adapters.store import BlobStore
from adapters.versions import Version
from adapters.weights import bytes_of_shapes


@dataclass(frozen=True)
class Place:
    """Where a version is now."""

    resident: bool
    pinned: bool
    pin_held: bool  # False: not pinned, or the pool has no room for the pin
    in_flight: int


class Residency:
    def __init__(
        self, registry: Registry, store: BlobStore, slots: SlotPool, leases: LeaseBook
    ) -> None:
        self._registry, self._store = registry, store
        self._slots, self._leases = slots, leases
        slots.users = leases.uses_of
        self.pins = Pins(PinTable(registry), pin_limit(slots), self._size_of, slots.keep)
        self.pins.restore(registry.read)
        slots.load_pinned([(pin.digest, pin.key, use) for use, pin in self.pins.held()])

    def place(self, version: Version) -> Place:
        use = use_of(version)
        return Place(
            self._slots.is_resident(version.digest, use),
            self.pins.is_pinned(use),
            self.pins.is_held(use),
            self._leases.of_use(use),
        )

    def is_resident(self, name: str, number: int, digest: str) -> bool:
        return self._slots.is_resident(digest, (name, number))

    def lease(self, reference: str, key: str) -> tuple[Version, Lease]:
        """The version a reference means, and a lease on it. Raises as Registry.resolve.

        Its load, on the account of the API key, begins where it is not resident.
        """
        while True:
            version = self._registry.resolve(reference)
            lease = self._leases.take(*use_of(version), version.digest)
            try:
                # A delete looks at the leases after its commit: what resolves still, with the
                # lease taken, stays until the lease is released.
                if self._registry.resolve(reference) == version:
                    self._slots.want(version.digest, key=key, use=use_of(version))
                    return version, lease
            except BaseException:
                lease.release()
                raise
            lease.release()

    def load(self, reference: str, timeout_s: float, key: str) -> tuple[Version, bool]:
        """Bring a version into the slots and wait for it; False where the time is over."""
        version = self._registry.resolve(reference)
        return version, self._slots.load_now(version.digest, timeout_s, key, use_of(version))

    def unload(self, reference: str, who: str) -> tuple[Version, int]:
        """Take a version out of the slots when the requests of now are answered; how many.

        Its pin goes with it. The slot stays while other names use the same bytes. Later requests
        load it again.
        """
        version = self._registry.resolve(reference)
        if self.pins.is_pinned(use_of(version)):
            self.pins.remove(version, who)
        return version, self._end_use(version)

    def _end_use(self, version: Version) -> int:
        """The version's requests of now; with the last of them it gives up its slot."""
        then = partial(self._drop, version.digest, use_of(version))
        return self._leases.when_use_ends(use_of(version), then)

    def _drop(self, digest: str, use: Use) -> None:
        # It may have been pinned while the last requests were still running: then it stays.
        if not self.pins.is_pinned(use):
            self._slots.drop(digest, use)

    def pin(self, reference: str, who: str, key: str) -> Version:
        """Load it and keep it in the slots, after a restart too. Raises PoolFull."""
        version = self._registry.resolve(reference)
        self.pins.check(version, key)
        self._slots.want(version.digest, for_jobs=False, key=key, use=use_of(version))
        self.pins.add(version, key, who)
        return version

    def unpin(self, reference: str, who: str) -> Version:
        version = self._registry.resolve(reference)
        self.pins.remove(version, who)
        return version

    def forget(self, versions: Sequence[Version]) -> int:
        """These versions were removed from the registry; how many requests still use them."""
        self.pins.forget(map(use_of, versions))
        return sum(map(self._end_use, versions))

    def _size_of(self, version: Version) -> int:
        """Bytes in the slots, from the header of its file; without that, as many as the file's."""
        try:
            header = read_header(self._store.path(version.digest))
        except (OSError, Invalid):
            return version.bytes
        shapes = {name: entry.shape for name, entry in header.tensors.items()}
        return bytes_of_shapes(shapes, self._slots.dtype)


def use_of(version: Version) -> Use:
    return version.name, version.number


def pin_limit(slots: SlotPool) -> Limit:
    """Half of the pool."""
    return Limit(slots.capacity_bytes // 2, slots.max_slots // 2 if slots.max_slots else None)
