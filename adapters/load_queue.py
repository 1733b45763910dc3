"""LoadQueue: the loads that wait, dealt round robin over API keys."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from adapters.errors import PoolFull
from adapters.slot import Use, Uses

# Loads ahead of requests (POST /load, pins, swaps) that one key can have waiting.
MOST_PRELOADS = 64
# Loads for jobs that one key can have waiting. Further ones are asked for again when the device
# thread next deals, after each load, so nothing is lost by not queueing them now.
MOST_FOR_JOBS = 1024


@dataclass(eq=False)
class Load:
    """One digest to be loaded, for any number of keys and versions."""

    digest: str
    for_jobs: bool = False
    keys: set[str] = field(default_factory=set)
    uses: Uses = field(default_factory=Uses)
    size: int | None = None  # placed bytes, once its file was read

    def join(self, for_jobs: bool, key: str, uses: Iterable[Use]) -> None:
        """Another request wants the same digest."""
        self.for_jobs |= for_jobs
        self.keys.add(key)
        self.uses.add(uses)


@dataclass
class Line:
    """What one key waits for: loads for jobs before loads ahead, each first come first served."""

    for_jobs: OrderedDict[str, Load] = field(default_factory=OrderedDict)
    ahead: OrderedDict[str, Load] = field(default_factory=OrderedDict)

    @property
    def head(self) -> Load:
        return next(iter((self.for_jobs or self.ahead).values()))

    def __bool__(self) -> bool:
        return bool(self.for_jobs or self.ahead)

    def drop(self, digest: str) -> None:
        self.for_jobs.pop(digest, None)
        self.ahead.pop(digest, None)


class LoadQueue:
    """Not thread-safe. A digest that several keys want is loaded once, at the first of their turns.

    Memory is bounded: a key has at most MOST_FOR_JOBS + MOST_PRELOADS loads waiting, and a key
    without any has no entry.
    """

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}
        self._lines: OrderedDict[str, Line] = OrderedDict()  # by key, in the order of their turns

    def __len__(self) -> int:
        return len(self._loads)

    def find(self, digest: str) -> Load | None:
        return self._loads.get(digest)

    def add(
        self,
        digest: str,
        for_jobs: bool,
        key: str,
        uses: Iterable[Use],
        most_preloads: int = MOST_PRELOADS,
    ) -> None:
        """Raises PoolFull where the key has `most_preloads` loads ahead waiting."""
        line = self._lines.get(key) or Line()
        known = digest in line.for_jobs or digest in line.ahead
        if not known and for_jobs and len(line.for_jobs) >= MOST_FOR_JOBS:
            return
        if not known and not for_jobs and len(line.ahead) >= most_preloads:
            raise PoolFull(f"{most_preloads} loads of this key wait already; try again later")
        load = self._loads.setdefault(digest, Load(digest))
        load.join(for_jobs, key, uses)
        if for_jobs:
            line.ahead.pop(digest, None)
            line.for_jobs[digest] = load
        elif not known:
            line.ahead[digest] = load
        self._lines[key] = line

    def heads(self) -> Iterator[tuple[str, Load]]:
        """The next load of each key, in the order of the keys' turns."""
        yield from [(key, line.head) for key, line in self._lines.items()]

    def take(self, key: str, load: Load) -> None:
        """`load` is begun in the turn of `key`."""
        self.drop(load.digest)
        if key in self._lines:
            self._lines.move_to_end(key)

    def give_back(self, key: str, load: Load) -> None:
        """`load` found no room: it stays the first of the key, whose turn is the next again."""
        self._loads[load.digest] = load
        for each in load.keys:
            line = self._lines.setdefault(each, Line())
            order = line.for_jobs if load.for_jobs else line.ahead
            order[load.digest] = load
            order.move_to_end(load.digest, last=False)
        self._lines.move_to_end(key, last=False)

    def drop(self, digest: str) -> None:
        load = self._loads.pop(digest, None)
        for key in load.keys if load else ():
            line = self._lines.get(key)
            if line is not None:
                line.drop(digest)
                if not line:
                    del self._lines[key]
