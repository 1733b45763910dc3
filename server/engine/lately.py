"""Lately: what each line of the queue was given in the last seconds."""

from collections import defaultdict
from collections.abc import Hashable
from typing import Generic, TypeVar

PERIOD_S = 1.5  # several batches, and short beside a change of what is asked

Key = TypeVar("Key", bound=Hashable)


class Lately(Generic[Key]):
    """Counts this period and the one before; what is older is forgotten.

    Times are those of time.monotonic().
    """

    def __init__(self) -> None:
        self._now: dict[Key, int] = defaultdict(int)
        self._before: dict[Key, int] = {}
        self._began, self._before_began = 0.0, 0.0

    def note(self, key: Key, tokens: int, now: float) -> None:
        self._turn(now)
        self._now[key] += tokens

    def rates(self, now: float) -> dict[Key, float]:
        """Tokens a second of each."""
        self._turn(now)
        both = self._before | self._now
        for key in self._before.keys() & self._now.keys():
            both[key] += self._before[key]
        seconds = max(PERIOD_S, now - self._before_began)
        return {key: tokens / seconds for key, tokens in both.items()}

    def _turn(self, now: float) -> None:
        if now < self._began + PERIOD_S:
            return
        if now >= self._began + 2 * PERIOD_S:  # it had nothing to do for so long
            self._now, self._began = {}, now
        self._before, self._before_began = self._now, self._began
        self._now, self._began = defaultdict(int), now
