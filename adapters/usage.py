"""How often each name was asked for since the start of the process."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

MOST = 1 << 17  # names; a deleted one is forgotten at once


@dataclass
class Usage:
    """How one name was used since the start of the process."""

    requests: int = 0
    last_used: float | None = None  # seconds since 1970


class UsageBook:
    """Counts by name. Thread-safe."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._usage: OrderedDict[str, Usage] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def count(self, name: str) -> None:
        with self._lock:
            usage = self._usage.setdefault(name, Usage())
            usage.requests += 1
            usage.last_used = time.time()
            self._usage.move_to_end(name)
            if len(self._usage) > self._most:
                self._usage.popitem(last=False)

    def of(self, name: str) -> Usage:
        return self._usage.get(name, Usage())

    def forget(self, name: str) -> None:
        """The name was deleted: one that takes its place begins at nothing."""
        with self._lock:
            self._usage.pop(name, None)

    def values(self, of_last_use: bool) -> dict[str, float]:
        """By name, the time of the last request or the number of requests."""
        with self._lock:
            return {
                name: (usage.last_used or 0.0) if of_last_use else usage.requests
                for name, usage in self._usage.items()
            }
