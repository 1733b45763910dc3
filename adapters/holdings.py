"""Holdings: which API key holds which slots, and which slot is evicted next.

Max-min fairness over keys, least recently used within a key. A slot counts in full for each key
that used it. To evict it for one key takes it from that key's holdings; the slot itself is freed
when the last of its keys has lost it. So no key can bring another into debt by using its adapters.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial

from adapters.slot import Slot

# A slot that was not used for so long is evicted before any other, whatever its key holds: memory
# that is kept for a key without traffic would serve nobody.
IDLE_S = 60.0
MOST_KEYS = 16  # keys that one slot counts for; with more, the least recent ones are dropped

Pinned = Callable[[str], bool]


class Holdings:
    """Not thread-safe. A choice takes time in the number of keys, not in that of slots."""

    def __init__(self) -> None:
        self._all: OrderedDict[Slot, None] = OrderedDict()  # least recently used first
        self._by_key: dict[str, OrderedDict[Slot, None]] = {}
        self._bytes: dict[str, int] = {}

    def use(self, slot: Slot, key: str, now: float) -> None:
        """Count the slot for the key, as its most recently used one."""
        slot.used_at = now
        self._all[slot] = None
        self._all.move_to_end(slot)
        if key not in slot.keys:
            self._bytes[key] = self.bytes_of(key) + slot.extent.bytes
        order = self._by_key.setdefault(key, OrderedDict())
        order[slot] = None
        order.move_to_end(slot)
        slot.keys[key] = None
        slot.keys.move_to_end(key)
        if len(slot.keys) > MOST_KEYS:
            self._leave(slot, next(iter(slot.keys)))

    def remove(self, slot: Slot) -> None:
        """The slot is evicted: it counts for nobody any more."""
        for key in list(slot.keys):
            self._leave(slot, key)
        del self._all[slot]

    def bytes_of(self, key: str) -> int:
        return self._bytes.get(key, 0)

    def _leave(self, slot: Slot, key: str) -> None:
        del slot.keys[key]
        del self._by_key[key][slot]
        self._bytes[key] -= slot.extent.bytes
        if not self._by_key[key]:
            del self._by_key[key], self._bytes[key]

    def victim(
        self, key: str, size: int, now: float, pinned: Pinned, may_leave: bool
    ) -> Slot | None:
        """The slot to evict so that `key` can load `size` bytes; None: wait for a hold to end.

        A slot that is idle, else the least recently used one of the key that would then hold the
        most. A key never loses a slot to a key that would hold more than it does, unless the
        loading key has no slot of its own to give. With `may_leave` it may be a slot that a batch
        holds now, where the key that is to give has no other: else a key whose slots are in every
        batch would never lose one.
        """
        idle = self._idle(now, pinned)
        while idle is None:
            taken = self._next(key, size, now, pinned, may_leave)
            if taken is None:
                return None
            holder, slot = taken
            if len(slot.keys) == 1:
                return slot
            self._leave(slot, holder)  # another key still uses it
        return idle

    def _idle(self, now: float, pinned: Pinned) -> Slot | None:
        before = now - IDLE_S
        return _first(
            self._all, pinned, partial(_is_free, now=now), lambda slot: slot.used_at > before
        )

    def _next(
        self, key: str, size: int, now: float, pinned: Pinned, may_leave: bool
    ) -> tuple[str, Slot] | None:
        """A key that is to lose a slot, and which."""
        own = self.bytes_of(key) + size
        for holder, is_above in self._holders(key, own, pinned):
            # The rest after a load protects a slot from its own key and from those that hold more.
            moment = math.inf if is_above else now
            slots = self._by_key[holder]
            slot = _first(slots, pinned, partial(_is_free, now=moment))
            held = slot is None and _first(slots, pinned, lambda slot: slot.holds > 0)
            if held and may_leave:
                slot = held
            if slot is not None:
                return holder, slot
            if held and is_above:
                return None
        return None

    def _holders(self, key: str, own: int, pinned: Pinned) -> Iterator[tuple[str, bool]]:
        """Keys that may lose a slot, in order, and whether each holds more than `own` bytes."""
        others = sorted(((n, k) for k, n in self._bytes.items() if k != key), reverse=True)
        yield from ((holder, True) for held, holder in others if held > own)
        if _first(self._by_key.get(key, OrderedDict()), pinned, lambda slot: True) is not None:
            yield key, False
            return
        yield from ((holder, False) for held, holder in others if held <= own)


def _is_free(slot: Slot, now: float) -> bool:
    return not slot.holds and slot.fresh_until <= now


def _first(
    slots: OrderedDict[Slot, None],
    pinned: Pinned,
    fits: Callable[[Slot], bool],
    ends: Callable[[Slot], bool] = lambda slot: False,
) -> Slot | None:
    """The first slot that is not pinned and fits. Pinned ones are moved behind the others, so
    that the next search does not meet them again."""
    passed, found = [], None
    for slot in slots:
        if pinned(slot.digest):
            passed.append(slot)
        elif ends(slot):
            break
        elif fits(slot):
            found = slot
            break
    for slot in passed:
        slots.move_to_end(slot)
    return found
