"""KeyLines: what waits, in one line per API key; every key gets the same share of the work."""

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Costs(Protocol):
    @property
    def cost(self) -> int: ...  # in any unit, the same for all: pieces of work, or bytes


Item = TypeVar("Item", bound=Costs)


class KeyLines(Generic[Item]):
    """Start-time fair queueing (Goyal, Vin and Cheng 1996) over keys, first come first served
    within a key.

    Each key has a start tag: the cost served to it so far, and at least that of the item served
    last. The key with the lowest tag is next. A key that was idle thus starts level with the
    others: it waits for at most one item of each, and has saved up nothing.
    """

    def __init__(self) -> None:
        self._lines: dict[str, deque[Item]] = {}
        self._tags: dict[str, int] = {}
        self._clock = 0  # start tag of the item served last

    def __len__(self) -> int:
        """The number of keys that have something waiting."""
        return len(self._lines)

    def line(self, key: str) -> "deque[Item] | tuple[()]":
        return self._lines.get(key, ())

    def add(self, key: str, item: Item) -> None:
        if key not in self._lines:
            self._lines[key] = deque()
            self._tags[key] = max(self._clock, self._tags.get(key, 0))
        self._lines[key].append(item)

    def next(self, may_begin: Callable[[str], bool] = lambda key: True) -> str | None:
        """The key that is next among those that may begin; None where none waits."""
        return min(filter(may_begin, self._lines), key=self._tags.__getitem__, default=None)

    def pop(self, key: str) -> Item:
        """The next item of a key that has one."""
        item = self._lines[key].popleft()
        self._clock = self._tags[key]
        self._tags[key] += item.cost
        if not self._lines[key]:
            del self._lines[key]
        kept = self._tags.items()
        self._tags = {k: tag for k, tag in kept if k in self._lines or tag > self._clock}
        return item

    def drop(self, key: str, item: Item) -> bool:
        """Take out an item; False if it does not wait here any more."""
        line = self._lines.get(key)
        if line is None or item not in line:
            return False
        line.remove(item)
        if not line:
            del self._lines[key]
        return True

    def clear(self) -> list[Item]:
        """Take out all."""
        items = [item for line in self._lines.values() for item in line]
        self._lines.clear()
        return items

    def round_cost(self) -> int:
        """The cost of the first item of every key."""
        return sum(line[0].cost for line in self._lines.values())
