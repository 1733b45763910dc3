"""SlotTable: the slots of the arena by digest, and whose turn it is to lose one."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from adapters.arena import Arena, Extent
from adapters.holdings import Holdings
from adapters.slot import Slot


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


class SlotTable:
    """Not thread-safe: SlotPool calls it under its lock."""

    def __init__(self, capacity_bytes: int, max_slots: int, device: torch.device, debug: bool):
        self.max_slots = max_slots  # 0: as many as the bytes allow
        self.arena = Arena(capacity_bytes, device, poison=debug)
        self.slots: dict[str, Slot] = {}
        self.leaving: set[Slot] = set()
        self.pinned: frozenset[str] = frozenset()
        self.loads = self.evictions = 0
        self._holdings = Holdings()

    def add(self, slot: Slot) -> None:
        """A load is done; `use` says for whom."""
        self.slots[slot.digest] = slot
        self.loads += 1

    def use(self, slot: Slot, keys: Iterable[str]) -> None:
        """Count the slot as the most recently used one of each key."""
        now = time.monotonic()
        for key in keys:
            self._holdings.use(slot, key, now)

    def let_go(self, slot: Slot) -> None:
        """End one hold."""
        assert slot.holds > 0, f"{slot.digest} was let go without a hold"
        slot.holds -= 1
        if slot.leaving and not slot.holds:
            self.leaving.discard(slot)
            self.arena.free(slot.extent)

    def room(self, key: str, size: int) -> Extent | None:
        """Room for a load of `key`, evicting where that may be; None: there is none yet."""
        while True:
            if not self.max_slots or len(self.slots) + len(self.leaving) < self.max_slots:
                extent = self.arena.allocate(size)
                if extent is not None:
                    return extent
            now = time.monotonic()
            victim = self._holdings.victim(
                key, size, now, self.pinned.__contains__, may_leave=not self.leaving
            )
            if victim is None:
                return None
            self.take_out(victim)
            self.evictions += 1

    def is_stuck(self) -> bool:
        """Whether no slot will ever become free for a load: all are pinned."""
        return not self.leaving and all(digest in self.pinned for digest in self.slots)

    def take_out(self, slot: Slot) -> None:
        """Free the slot, at once or when the batch that holds it ends."""
        del self.slots[slot.digest]
        self._holdings.remove(slot)
        if slot.holds:
            slot.leaving = True
            self.leaving.add(slot)
        else:
            self.arena.free(slot.extent)

    def stats(self) -> PoolStats:
        return PoolStats(
            resident=len(self.slots),
            pinned=sum(digest in self.slots for digest in self.pinned),
            held=sum(slot.holds for slot in (*self.slots.values(), *self.leaving)),
            leaving=len(self.leaving),
            used_bytes=self.arena.capacity - self.arena.free_bytes,
            capacity_bytes=self.arena.capacity,
            loads=self.loads,
            evictions=self.evictions,
        )
