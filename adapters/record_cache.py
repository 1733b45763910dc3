"""RecordCache: parsed records by their text, within a bound of memory."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Parsed = TypeVar("Parsed")


class RecordCache(Generic[Parsed]):
    """Remembers what `parse` made of a text, the latest used of them up to `most` characters."""

    def __init__(self, parse: Callable[[str], Parsed], most: int) -> None:
        self._parse, self._most = parse, most
        self._known: OrderedDict[str, Parsed] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def __call__(self, text: str) -> Parsed:
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return self._known[text]
        parsed = self._parse(text)
        with self._lock:
            self._remember(text, parsed)
        return parsed

    @property
    def characters(self) -> int:
        return self._characters

    def _remember(self, text: str, parsed: Parsed) -> None:
        if len(text) > self._most:
            return
        if text not in self._known:
            self._characters += len(text)
        self._known[text] = parsed
        while self._characters > self._most:
            old, _ = self._known.popitem(last=False)
            self._characters -= len(old)
