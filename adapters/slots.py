"""SlotPool: which adapters are resident, within a bound; loading ahead, eviction, pins.

A slot is an extent of the arena as long as its adapter needs. The device thread holds slots while
a batch runs; the loader thread fills new ones meanwhile, and never writes to a held one.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from adapters.arena import Arena, Extent
from adapters.errors import Invalid, PoolFull, TrunklineError
from adapters.format import AdapterSet
from adapters.host_tier import HostTier
from adapters.weights import Cursor, placed_bytes, weights_of
from model.config import GPTConfig
from model.lora import AdapterWeights

log = logging.getLogger("trunkline.slots")

# A slot loaded for waiting jobs is not evicted for so long, so that two cold adapters can't evict
# each other for ever before either is served.
FRESH_S = 1.0
# What failed to load is tried again for requests that come later than this.
FAILURE_S = 1.0


@dataclass(eq=False)
class Slot:
    digest: str
    extent: Extent
    weights: AdapterWeights
    fresh_until: float  # time.monotonic()
    holds: int = 0  # batches that use it now: at most the one on the device
    leaving: bool = False  # to be freed when the last hold ends; not found by its digest any more


@dataclass(frozen=True)
class PoolStats:
    resident: int
    pinned: int
    held: int
    leaving: int
    used_bytes: int
    capacity_bytes: int
    loads: int
    evictions: int


class SlotPool:
    """Resident adapters by digest. All methods are thread-safe and none but `load_now` waits.

    `read` brings an adapter from disk (it may raise TrunklineError); `changed` is called, with no
    lock held, with the digest of every load that has ended, `loaded` with the seconds of one that
    succeeded.
    """

    def __init__(
        self,
        config: GPTConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        capacity_bytes: int,
        max_slots: int,
        read: Callable[[str], AdapterSet],
        host_tier: HostTier | None = None,
        debug: bool = False,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.max_slots, self._read, self._host_tier = max_slots, read, host_tier
        self.changed: Callable[[str], None] = lambda digest: None  # the engine's, once there is one
        self.loaded: Callable[[float], None] = lambda seconds: None
        self._arena = Arena(capacity_bytes, device, poison=debug)
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # least recently used first
        self._leaving: set[Slot] = set()
        self._pinned: set[str] = set()
        self._failed: dict[str, tuple[float, TrunklineError]] = {}
        self._wanted: OrderedDict[str, bool] = OrderedDict()  # digest -> for waiting jobs
        self._loading: str | None = None
        self._cond = threading.Condition()
        self._closed = False
        self._loads = self._evictions = 0
        self._loader = threading.Thread(target=self._load_wanted, name="loader", daemon=True)
        self._loader.start()

    # What the device thread does.

    def hold(self, digest: str, key: str = "") -> Slot | None:
        """Its slot, not to be freed until `let_go`; or None, and then its load is under way.

        Raises the TrunklineError of a load that failed.
        """
        with self._cond:
            slot = self._slots.get(digest)
            if slot is None:
                self._want(digest, True, key)
                return None
            slot.holds += 1
            slot.fresh_until = 0.0
            self._slots.move_to_end(digest)
            return slot

    def let_go(self, slots: Iterable[Slot]) -> None:
        """End one hold on each."""
        with self._cond:
            for slot in slots:
                assert slot.holds > 0, f"{slot.digest} was let go without a hold"
                slot.holds -= 1
                if slot.leaving and not slot.holds:
                    self._leaving.discard(slot)
                    self._arena.free(slot.extent)
            self._cond.notify_all()

    # What requests and administrators do.

    def want(self, digest: str, for_jobs: bool = True, key: str = "") -> None:
        """Have it loaded soon, once for any number of calls; at once nothing where it is there.

        Raises the TrunklineError of a load that failed within FAILURE_S.
        """
        with self._cond:
            if digest not in self._slots:
                self._want(digest, for_jobs, key)

    def _want(self, digest: str, for_jobs: bool, key: str) -> None:
        failed = self._failed.get(digest)
        if failed is not None:
            if time.monotonic() - failed[0] < FAILURE_S:
                raise failed[1]
            del self._failed[digest]
        if digest != self._loading:
            self._wanted[digest] = self._wanted.get(digest, False) or for_jobs
            self._cond.notify_all()

    def load_now(self, digest: str, timeout_s: float, key: str = "") -> bool:
        """Wait until it is resident; False where the time is over. Raises as `want` does."""
        deadline = time.monotonic() + timeout_s
        with self._cond:
            while digest not in self._slots:
                self._want(digest, False, key)
                if not self._cond.wait(deadline - time.monotonic()):
                    return False
        return True

    def evict(self, digest: str, spare_pinned: bool = False) -> bool:
        """Free its slot, at once or when the batch under way ends; False where it has none.

        With `spare_pinned` a pinned one stays as it is.
        """
        with self._cond:
            if spare_pinned and digest in self._pinned:
                return False
            self._wanted.pop(digest, None)
            self._pinned.discard(digest)
            if digest not in self._slots:
                return False
            self._take_out(self._slots[digest])
            self._cond.notify_all()
            return True

    def pin(self, digest: str) -> None:
        """Exempt it from eviction. Raises PoolFull where half of the pool would be pinned."""
        with self._cond:
            others = self._pinned - {digest}
            pinned = [slot.extent.bytes for slot in self._slots.values() if slot.digest in others]
            own = self._slots[digest].extent.bytes if digest in self._slots else 0
            slots_pinned = self.max_slots and len(pinned) + 1 > self.max_slots // 2
            if sum(pinned) + own > self._arena.capacity // 2 or slots_pinned:
                raise PoolFull("half of the slots are pinned already; unpin others first")
            self._pinned.add(digest)

    def unpin(self, digest: str) -> None:
        with self._cond:
            self._pinned.discard(digest)
            self._cond.notify_all()

    def forgive(self, digest: str) -> None:
        """Forget that its load failed: its file was mended."""
        with self._cond:
            self._failed.pop(digest, None)

    def is_resident(self, digest: str) -> bool:
        with self._cond:
            return digest in self._slots

    def is_pinned(self, digest: str) -> bool:
        with self._cond:
            return digest in self._pinned

    def check_size(self, adapter: AdapterSet) -> None:
        """Raises Invalid for an adapter that could never be resident."""
        size = placed_bytes(adapter, self.dtype)
        if size > self._arena.capacity // 2:
            raise Invalid(
                "too_large",
                f"the adapter needs {size} bytes; half of the adapter memory is "
                f"{self._arena.capacity // 2}",
            )

    def stats(self) -> PoolStats:
        with self._cond:
            slots = [*self._slots.values(), *self._leaving]
            return PoolStats(
                resident=len(self._slots),
                pinned=sum(digest in self._pinned for digest in self._slots),
                held=sum(slot.holds for slot in slots),
                leaving=len(self._leaving),
                used_bytes=self._arena.capacity - self._arena.free_bytes,
                capacity_bytes=self._arena.capacity,
                loads=self._loads,
                evictions=self._evictions,
            )

    def close(self) -> None:
        with self._cond:
            self._closed = True
            self._cond.notify_all()
        self._loader.join()

    # What the loader thread does.

    def _load_wanted(self) -> None:
        while True:
            with self._cond:
                while not self._wanted and not self._closed:
                    self._cond.wait()
                if self._closed:
                    return
                self._loading, for_jobs = self._wanted.popitem(last=False)
                digest = self._loading
            began = time.monotonic()
            try:
                self._load(digest, for_jobs)
                self.loaded(time.monotonic() - began)
            except TrunklineError as error:
                self._fail(digest, error)
            except Exception:
                log.exception("loading %s failed", digest)
                self._fail(digest, PoolFull("the adapter could not be loaded; the log says why"))
            with self._cond:
                self._loading = None
                self._cond.notify_all()
            self.changed(digest)

    def _load(self, digest: str, for_jobs: bool) -> None:
        image = self._host_tier.get(digest, self._read) if self._host_tier else None
        adapter = image.outline if image else self._read(digest)
        extent = self._find_room(placed_bytes(adapter, self.dtype))
        if extent is None:
            return  # closed meanwhile
        room = self._arena.view(extent)
        if image is not None:
            room.copy_(image.buffer)  # one copy to the device, from pinned memory
        cursor = Cursor(room, copy=image is None)
        weights = weights_of(adapter, self.config, self.dtype, cursor)
        with self._cond:
            fresh_until = time.monotonic() + FRESH_S if for_jobs else 0.0
            self._slots[digest] = Slot(digest, extent, weights, fresh_until)
            self._loads += 1

    def _find_room(self, size: int) -> Extent | None:
        """Evicts the least recently used until there is room, waiting for holds to end.

        Raises PoolFull where what is pinned leaves no room at all.
        """
        with self._cond:
            while not self._closed:
                if not self.max_slots or len(self._slots) + len(self._leaving) < self.max_slots:
                    extent = self._arena.allocate(size)
                    if extent is not None:
                        return extent
                if not self._evict_one() and not self._wait_for_room():
                    raise PoolFull("every slot is pinned; there is no room to load an adapter")
        return None

    def _evict_one(self) -> bool:
        now = time.monotonic()
        for slot in self._slots.values():
            if not slot.holds and slot.digest not in self._pinned and slot.fresh_until <= now:
                self._take_out(slot)
                self._evictions += 1
                return True
        return False

    def _wait_for_room(self) -> bool:
        """False where no slot will ever become free for it."""
        movable = [s for s in self._slots.values() if s.digest not in self._pinned]
        if not movable and not self._leaving:
            return False
        until = min((s.fresh_until for s in movable if not s.holds), default=None)
        self._cond.wait(None if until is None else max(0.0, until - time.monotonic()))
        return True

    def _take_out(self, slot: Slot) -> None:
        del self._slots[slot.digest]
        if slot.holds:
            slot.leaving = True
            self._leaving.add(slot)
        else:
            self._arena.free(slot.extent)

    def _fail(self, digest: str, error: TrunklineError) -> None:
        log.warning("%s was not loaded: %s", digest, error)
        with self._cond:
            self._failed[digest] = (time.monotonic(), error)
