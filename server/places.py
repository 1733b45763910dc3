"""Places: so many requests of one kind at a time, shared by API key first."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from server.engine.admission import overloaded
from server.engine.rate import DrainRate


class Places:
    """A key may hold fewer places than are free of `most`: alone half of them, two keys a third
    each, so that there is always one for another key (dynamic thresholds, Choudhury and Hahne
    1998). The state belongs to the event loop.
    """

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what = most, what
        self._held: dict[str, int] = {}
        self._rate = DrainRate()  # of requests, by the seconds that each held its place

    @property
    def held(self) -> int:
        return sum(self._held.values())

    @contextmanager
    def take(self, key: str) -> Iterator[None]:
        """A place until the end of the block. Raises Overloaded if the key has its share."""
        own = self._held.get(key, 0)
        if own >= self._most - self.held:
            sentence = f"{own} {self._what} of this key are under way, which is its share"
            raise overloaded(sentence, self._rate.seconds(1) / max(1, own))
        self._held[key] = own + 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._rate.note(1, time.monotonic() - began)
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
