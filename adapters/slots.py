"""SlotPool: which adapters are resident, within a bound; loading ahead, eviction, pins.

A slot is an extent of the arena as long as its adapter needs. The device thread holds slots while
a batch runs; the loader thread fills new ones meanwhile, and never writes to a held one. Loads are
dealt round robin over API keys (load_queue.py), and evictions are charged to the key that holds
the most (holdings.py).
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable

import torch

from adapters.arena import Extent
from adapters.errors import Invalid, PoolFull, TrunklineError
from adapters.format import AdapterSet
from adapters.host_tier import HostTier
from adapters.load_failures import LoadFailures
from adapters.load_queue import Load, LoadQueue
from adapters.slot import Slot, Use
from adapters.slot_filler import SlotFiller, Source
from adapters.slot_table import PoolStats, SlotTable
from adapters.weights import placed_bytes
from model.config import GPTConfig

__all__ = ["PoolStats", "Slot", "SlotPool"]

log = logging.getLogger("trunkline.slots")

# A slot that was loaded for waiting jobs is not evicted for this long by loads of its own key, so
# that two cold adapters can't evict each other for ever before either is served.
FRESH_S = 1.0
# How often a load that found no room looks for it again, besides whenever a hold ends.
ROOM_CHECK_S = 0.05


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
        self.dtype, self.device, self.max_slots = dtype, device, max_slots
        self._filler = SlotFiller(config, dtype, read, host_tier)
        self.changed: Callable[[str], None] = lambda digest: None  # the engine's, once there is one
        self.loaded: Callable[[float], None] = lambda seconds: None
        self.users: Callable[[str], Collection[Use]] = lambda digest: ()  # who has leases on it
        self._table = SlotTable(capacity_bytes, max_slots, device, debug)
        self._failed = LoadFailures()
        self._wanted = LoadQueue()
        self._loading: Load | None = None
        self._cond = threading.Condition()
        self._closed = False
        self._loader = threading.Thread(target=self._load_wanted, name="loader", daemon=True)
        self._loader.start()

    # What the device thread does.

    def hold(self, digest: str, key: str = "") -> Slot | None:
        """Its slot, not to be freed until `let_go`; or None, and then its load is under way.

        Raises the TrunklineError of a load that failed.
        """
        with self._cond:
            slot = self._table.slots.get(digest)
            if slot is None:
                self._want(digest, True, key, ())
                return None
            slot.holds += 1
            slot.fresh_until = 0.0
            self._table.use(slot, (key,))
            return slot

    def let_go(self, slots: Iterable[Slot]) -> None:
        """End one hold on each."""
        with self._cond:
            for slot in slots:
                self._table.let_go(slot)
            self._cond.notify_all()

    # What requests and administrators do.

    def want(
        self, digest: str, for_jobs: bool = True, key: str = "", use: Use | None = None
    ) -> None:
        """Have the digest loaded soon, on the account of an API key; once for any number of calls.

        `use` is the version that it is loaded for. Raises the TrunklineError of a load that failed
        within FAILURE_S, and PoolFull for too many loads ahead of one key.
        """
        with self._cond:
            self._want(digest, for_jobs, key, () if use is None else (use,))

    def _want(self, digest: str, for_jobs: bool, key: str, uses: Collection[Use]) -> None:
        slot = self._table.slots.get(digest)
        if slot is not None:
            slot.uses.add(uses)
            return
        self._failed.check(digest)
        if self._loading is not None and self._loading.digest == digest:
            self._loading.join(for_jobs, key, uses)
        else:
            self._wanted.add(digest, for_jobs, key, uses)
            self._cond.notify_all()

    def load_now(
        self, digest: str, timeout_s: float, key: str = "", use: Use | None = None
    ) -> bool:
        """Wait until it is resident; False where the time is over. Raises as `want` does."""
        deadline = time.monotonic() + timeout_s
        uses = () if use is None else (use,)
        with self._cond:
            while digest not in self._table.slots:
                self._want(digest, False, key, uses)
                if not self._cond.wait(deadline - time.monotonic()):
                    return False
            self._want(digest, False, key, uses)
        return True

    def load_pinned(self, pins: Collection[tuple[str, str, Use]]) -> None:
        """Load the pinned ones of the start, (digest, key, version) each, ahead of requests."""
        with self._cond:
            for digest, key, use in pins:
                self._wanted.add(digest, False, key, (use,), most_preloads=len(pins))
            self._cond.notify_all()

    def succeed(self, previous: str, digest: str, use: Use) -> None:
        """Load a version of a name ahead where an earlier version of that name is in use.

        On the account of the key that used the earlier one last. Does nothing where the key has
        too many loads waiting, or where the load failed before.
        """
        with self._cond:
            slot = self._table.slots.get(previous)
            if slot is None or not any(name == use[0] for name, _ in slot.uses):
                return
            try:
                self._want(digest, False, next(reversed(slot.keys), ""), (use,))
            except TrunklineError as error:
                log.info("%s is not loaded ahead: %s", digest, error)

    def drop(self, digest: str, use: Use) -> None:
        """A version no longer uses the digest: its slot is freed when it was the last.

        At once, or when the batch under way ends. A pinned slot stays.
        """
        with self._cond:
            load = self._wanted.find(digest)
            if load is not None:
                load.uses.discard(use)
                if load.uses.gone and not load.for_jobs:
                    self._wanted.drop(digest)
            slot = self._table.slots.get(digest)
            if slot is not None:
                slot.uses.discard(use)
                if slot.uses.gone and digest not in self._table.pinned:
                    self._table.take_out(slot)
                    self._cond.notify_all()

    def evict(self, digest: str) -> bool:
        """Free its slot, at once or when the batch under way ends; False where it has none."""
        with self._cond:
            self._wanted.drop(digest)
            if digest not in self._table.slots:
                return False
            self._table.take_out(self._table.slots[digest])
            self._cond.notify_all()
            return True

    def keep(self, digests: Collection[str]) -> None:
        """Exempt these from eviction, and no others. adapters.pins bounds how many they are."""
        with self._cond:
            self._table.pinned = frozenset(digests)
            self._cond.notify_all()

    def forgive(self, digest: str) -> None:
        """Forget that its load failed: its file was mended."""
        with self._cond:
            self._failed.forgive(digest)

    def is_resident(self, digest: str, use: Use | None = None) -> bool:
        """Whether the digest is in a slot; with `use`, whether this version brought it there or
        used it since."""
        with self._cond:
            slot = self._table.slots.get(digest)
            return slot is not None and (use is None or use in slot.uses)

    def is_pinned(self, digest: str) -> bool:
        return digest in self._table.pinned

    @property
    def capacity_bytes(self) -> int:
        return self._table.arena.capacity

    def check_size(self, adapter: AdapterSet) -> None:
        """Raises Invalid for an adapter that could never be resident."""
        size = placed_bytes(adapter, self.dtype)
        if size > self._table.arena.capacity // 2:
            raise Invalid(
                "too_large",
                f"the adapter needs {size} bytes; half of the adapter memory is "
                f"{self._table.arena.capacity // 2}",
            )

    def stats(self) -> PoolStats:
        with self._cond:
            return self._table.stats()

    def close(self) -> None:
        with self._cond:
            self._closed = True
            self._cond.notify_all()
        self._loader.join()

    # What the loader thread does.

    def _load_wanted(self) -> None:
        while (picked := self._pick()) is not None:
            began = time.monotonic()
            if self._try(*picked):
                self.loaded(time.monotonic() - began)
            with self._cond:
                self._loading = None
                self._cond.notify_all()
            self.changed(picked[1].digest)

    def _try(self, key: str, load: Load, extent: Extent | None) -> bool:
        """Whether the load is done; one that failed is remembered as such."""
        try:
            return self._load(key, load, extent)
        except TrunklineError as error:
            self._fail(load.digest, error)
        except Exception:
            log.exception("loading %s failed", load.digest)
            refusal = PoolFull("the adapter could not be loaded; the log says why")
            self._fail(load.digest, refusal)
        return False

    def _pick(self) -> tuple[str, Load, Extent | None] | None:
        """The next load, with the key whose turn it is, and its room where its size is known.

        A load without room does not keep other keys' loads waiting. None when the pool is closed.
        """
        with self._cond:
            while not self._closed:
                for key, load in self._wanted.heads():
                    extent = None if load.size is None else self._table.room(key, load.size)
                    if extent is not None or load.size is None or self._table.is_stuck():
                        self._wanted.take(key, load)
                        self._loading = load
                        return key, load, extent
                self._cond.wait(ROOM_CHECK_S if self._wanted else None)
        return None

    def _load(self, key: str, load: Load, extent: Extent | None) -> bool:
        """Whether it was loaded; else there was no room yet, and it waits again.

        Raises PoolFull where what is pinned leaves no room at all.
        """
        try:
            source = self._filler.read(load.digest)
            load.size = source.size
            extent = extent or self._room(key, load, source)
            if extent is None:
                return False
            weights = self._filler.fill(self._table.arena.view(extent), source)
        except BaseException:
            if extent is not None:
                with self._cond:
                    self._table.arena.free(extent)
            raise
        with self._cond:
            self._add(Slot(load.digest, extent, weights), key, load)
            self._loading = None
        return True

    def _room(self, key: str, load: Load, source: Source) -> Extent | None:
        """Room for a load whose size is known now; without any, it goes back into the queue."""
        with self._cond:
            extent = self._table.room(key, source.size)
            if extent is None and self._table.is_stuck():
                raise PoolFull("every slot is pinned; there is no room to load an adapter")
            if extent is None:
                self._filler.park(source)
                self._loading = None
                self._wanted.give_back(key, load)
            return extent

    def _add(self, slot: Slot, key: str, load: Load) -> None:
        slot.fresh_until = time.monotonic() + FRESH_S if load.for_jobs else 0.0
        slot.uses.add([*load.uses, *self.users(slot.digest)])
        self._table.use(slot, {key} | load.keys)
        self._table.add(slot)

    def _fail(self, digest: str, error: TrunklineError) -> None:
        log.warning("%s was not loaded: %s", digest, error)
        with self._cond:
            self._failed.note(digest, error)
