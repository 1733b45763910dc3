"""Pins: which versions are exempt from eviction, counted when they are asked for.

A pin belongs to one version of one name. At most half of the pool can be pinned, and one API key
can pin at most half of that; without a key all of the half. The same bytes pinned under several
names count once in all, and once for each key.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from adapters.errors import PoolFull, TrunklineError
from adapters.pin_table import PinRow, PinTable
from adapters.slot import Use
from adapters.versions import Version

log = logging.getLogger("trunkline.adapters")


@dataclass(frozen=True)
class Limit:
    """How much may be pinned."""

    bytes: int
    slots: int | None  # None: only the bytes are limited

    def half(self) -> "Limit":
        return Limit(self.bytes // 2, None if self.slots is None else self.slots // 2)


@dataclass(frozen=True)
class Pin:
    digest: str
    bytes: int  # that it takes in the pool
    key: str


class Pins:
    """Thread-safe. Questions never wait for the disk; changes do.

    `keep` is called with the digests that are to be exempt from eviction; `size_of` says how many
    bytes a version takes in the pool, without loading it.
    """

    def __init__(
        self,
        table: PinTable,
        limit: Limit,
        size_of: Callable[[Version], int],
        keep: Callable[[set[str]], None],
    ) -> None:
        self._table, self._limit, self._size_of, self._keep = table, limit, size_of, keep
        self._changing = threading.Lock()
        # Replaced, never changed, so that a question needs no lock. The oldest first.
        self._pins: dict[Use, Pin] = {}
        self._held: frozenset[Use] = frozenset()

    def restore(self, version: Callable[[str], Version]) -> None:
        """Hold again what the table says, as far as the pool allows, the oldest first.

        What the pool has no room for stays in the table, is logged, and is held once there is.
        """
        pins: dict[Use, Pin] = {}
        for row in self._table.rows():
            try:
                pins[row.name, row.number] = self._pin(version(f"{row.name}@{row.number}"), row)
            except TrunklineError as error:
                log.warning("the pin of %s@%d is not held: %s", row.name, row.number, error)
        with self._changing:
            self._set(pins)
        for name, number in pins.keys() - self._held:
            log.warning("the pin of %s@%d is kept, not held: no room in the pool", name, number)

    def held(self) -> list[tuple[Use, Pin]]:
        return [(use, pin) for use, pin in self._pins.items() if use in self._held]

    def is_pinned(self, use: Use) -> bool:
        return use in self._pins

    def is_held(self, use: Use) -> bool:
        """Whether the pin is in force: there is one, and the pool has room for it."""
        return use in self._held

    def add(self, version: Version, key: str, who: str) -> None:
        """Raises PoolFull beyond the limits, VersionNotFound, ReadOnly or StorageFull."""
        use = version.name, version.number
        with self._changing:
            others = {each: pin for each, pin in self._pins.items() if each != use}
            pin = self._pin(version, PinRow(*use, key, 0.0))
            self._check(others.values(), pin)
            self._table.add(version, key, who)
            self._set(others | {use: pin})

    def check(self, version: Version, key: str) -> None:
        """Raises PoolFull where `add` would now."""
        use = version.name, version.number
        others = [pin for each, pin in self._pins.items() if each != use]
        self._check(others, self._pin(version, PinRow(*use, key, 0.0)))

    def remove(self, version: Version, who: str) -> None:
        """Raises ReadOnly or StorageFull."""
        with self._changing:
            self._table.remove(version, who)
            self._forget({(version.name, version.number)})

    def forget(self, uses: Iterable[Use]) -> None:
        """These versions were removed; the table has forgotten their pins already."""
        gone = set(uses)
        if gone & self._pins.keys():
            with self._changing:
                self._forget(gone)

    def _forget(self, uses: set[Use]) -> None:
        self._set({use: pin for use, pin in self._pins.items() if use not in uses})

    def _pin(self, version: Version, row: PinRow) -> Pin:
        return Pin(version.digest, self._size_of(version), row.key)

    def _set(self, pins: dict[Use, Pin]) -> None:
        held: dict[Use, Pin] = {}
        for use, pin in pins.items():
            if self._excess(held.values(), pin) is None:
                held[use] = pin
        self._pins, self._held = pins, frozenset(held)
        self._keep({pin.digest for pin in held.values()})

    def _check(self, others: Iterable[Pin], pin: Pin) -> None:
        excess = self._excess(others, pin)
        if excess is not None:
            raise PoolFull(excess)

    def _excess(self, others: Iterable[Pin], pin: Pin) -> str | None:
        """Which limit the pin would pass beside the others, as a sentence."""
        everybody = {other.digest: other.bytes for other in others}
        if _passes(everybody, pin, self._limit):
            return "half of the slots are pinned already; unpin others first"
        own = {other.digest: other.bytes for other in others if other.key == pin.key}
        if pin.key and own and _passes(own, pin, self._limit.half()):
            return "this key has pinned a quarter of the slots already; unpin others first"
        return None


def _passes(pinned: dict[str, int], pin: Pin, limit: Limit) -> bool:
    after = pinned | {pin.digest: pin.bytes}
    too_many = limit.slots is not None and len(after) > limit.slots
    return too_many or sum(after.values()) > limit.bytes
