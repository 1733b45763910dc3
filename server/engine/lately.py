"""Lately: what each line of the queue was given in the last seconds."""

from collections import defaultdict
from collections.abc import Hashable
from typing import Generic, TypeVar

PERIOD_S = 1.5  # several batches, and short beside a change of what is asked

Key = TypeVar("Key", bound=Hashable)


class Lately(Generic[Key]):
    """Counts this period and the one before; what is older is forgotten."""

    def __init__(self) -> None:
        self._now: dict[Key, int] = defaultdict(int)
        self._before: dict[Key, int] = {}
        self._began = 0.0  # of this period

    def note(self, key: Key, tokens: int) -> None:
        self._now[key] += tokens

    def rates(self, now: float) -> dict[Key, float]:
        """Tokens a second of each; `now` as of time.monotonic()."""
        if now >= self._began + 2 * PERIOD_S:
            self._now.clear()  # it had nothing to do for so long
        if now >= self._began + PERIOD_S:
            self._before, self._now, self._began = self._now, defaultdict(int), now
        seconds = PERIOD_S + now - self._began
        both = self._before | self._now
        for key in self._before.keys() & self._now.keys():
            both[key] += self._before[key]
        return {key: tokens / seconds for key, tokens in both.items()}
