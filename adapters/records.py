"""Records read from the registry, remembered within a bound of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

MOST_BYTES = 512 << 10  # of texts: some 600 adapters of usual size; parsed they are four times that

Parsed = TypeVar("Parsed")


class ParsedTexts(Generic[Parsed]):
    """What texts were parsed to, the least recently asked for forgotten first. Thread-safe.

    The bound is one of bytes, not of texts: a record with many labels is a megabyte. A text beyond
    the bound is not remembered, and drives no other out.
    """

    def __init__(self, parse: Callable[[str], Parsed], most_bytes: int = MOST_BYTES) -> None:
        self._parse, self._most = parse, most_bytes
        self._known: OrderedDict[str, Parsed] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, text: str) -> Parsed:
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return self._known[text]
        parsed = self._parse(text)
        if len(text) > self._most:
            return parsed
        with self._lock:
            if text not in self._known:
                self._known[text] = parsed
                self._bytes += len(text)
            while self._bytes > self._most:
                self._bytes -= len(self._known.popitem(last=False)[0])
        return parsed

    def __len__(self) -> int:
        return len(self._known)
