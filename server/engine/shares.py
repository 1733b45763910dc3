"""Shares: how much of the queue an adapter gets, by its name or a pattern."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache

REMEMBERED = 4096  # names


class Shares:
    """A name's own share, else that of the first pattern that fits, else 1."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = dict(shares)
        self.of = lru_cache(maxsize=REMEMBERED)(self._of)

    def _of(self, name: str) -> float:
        if name in self._shares:
            return self._shares[name]
        return next((s for p, s in self._shares.items() if fnmatchcase(name, p)), 1.0)
