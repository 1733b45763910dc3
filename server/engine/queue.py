"""The queue between admission and the device thread: bounded, fair over keys and adapters."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain

from adapters.errors import TrunklineError
from adapters.slots import Slot
from adapters.versions import Version
from server.engine.job import Job
from server.engine.lately import Lately

# Tokens a line may send in one round: about one long row, so that rounds are short and whole.
QUANTUM = 512
OTHERS_S = 0.1  # so often the lines that have no jobs are looked for

Hold = Callable[[str], Slot | None]


LineKey = tuple[str, str, int]  # API key, adapter's name (the base has ""), version


@dataclass
class Line:
    """The waiting jobs of one key under one adapter version, first in, first out."""

    weight: float
    jobs: deque[Job] = field(default_factory=deque)
    tokens: int = 0
    deficit: float = 0.0

    def pop(self) -> Job:
        job = self.jobs.popleft()
        self.tokens -= job.tokens
        return job


@dataclass(frozen=True)
class Others:
    """The lines that were served lately and then had no jobs."""

    keys: Set[LineKey] = frozenset()
    rate: float = 0.0  # tokens a second that they were given
    weight: float = 0.0
    since: float = 0.0  # time.monotonic() when they were looked for


@dataclass
class Taken:
    """What the device thread is to do next."""

    jobs: list[Job] = field(default_factory=list)
    slots: dict[str, Slot] = field(default_factory=dict)  # held for the jobs, by digest
    unwanted: list[Job] = field(default_factory=list)  # abandoned, or past their deadline
    failed: list[tuple[Job, TrunklineError]] = field(default_factory=list)  # no load for them

    def __bool__(self) -> bool:
        return bool(self.jobs or self.unwanted or self.failed)


class JobQueue:
    """Deficit round robin over lines (Shreedhar and Varghese 1995), new lines first (RFC 8290).

    In its turn a line may send QUANTUM * weight tokens more, so a hot adapter can't starve the
    others; a turn that a full batch cuts short goes on in the next. A line that had nothing
    waiting in the last round has its turn at once: who asks for little waits for no flood. A line
    whose adapter is not resident waits, alone, until its load is done.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})  # adapter name -> share, 1 where not named
        # In the order of their turns; all of the new before any of the round. One that was emptied
        # stays in the round until its turn would come, so that it is not new again before that.
        self._new: OrderedDict[LineKey, Line] = OrderedDict()
        self._round: OrderedDict[LineKey, Line] = OrderedDict()
        self._weight = 0.0  # of the lines that wait: all that have jobs but the others
        self._tokens = 0  # of all lines
        self._longest = 0.0  # tokens of a line over its weight, at most
        self._lately: Lately[LineKey] = Lately()
        self._others = Others()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(len(line.jobs) for _, line in self._lines())

    def put(self, jobs: Sequence[Job]) -> None:
        """`wake` is to follow; a device thread that is awake may take them before it."""
        with self._changed:
            for job in jobs:
                key = line_key(job.key, job.adapter)
                line = self._line(key)
                if not line.jobs and key not in self._others.keys:
                    self._weight += line.weight
                line.jobs.append(job)
                line.tokens += job.tokens
                self._tokens += job.tokens
                self._longest = max(self._longest, line.tokens / line.weight)

    def ahead(self, keys: Iterable[LineKey], waiting: int, rate: float) -> float:
        """Tokens that are expected to run before a new job of these lines; of `waiting` in all.

        First what is on the device, which runs `rate` tokens a second, then the line's own jobs,
        between which others' are dealt: its tokens over its share.
        """
        with self._changed:
            return self._on_device(waiting) + self._longest_of(keys) / self._share(rate)

    def most_ahead(self, waiting: int, rate: float) -> float:
        """The same for the line that has most ahead; it may be a little more than that."""
        with self._changed:
            return self._on_device(waiting) + self._longest / self._share(rate)

    def longest(self, keys: Iterable[LineKey] | None = None) -> float:
        """Tokens that wait in the longest of these lines, or of all, each over its weight."""
        with self._changed:
            return self._longest if keys is None else self._longest_of(keys)

    def share(self, rate: float) -> float:
        """The part of the device that a line of weight 1 has while it waits; of `rate` tokens/s."""
        with self._changed:
            return self._share(rate)

    def _longest_of(self, keys: Iterable[LineKey]) -> float:
        lines = [line for line in map(self._find, keys) if line is not None]
        return max((line.tokens / line.weight for line in lines), default=0.0)

    def _on_device(self, waiting: int) -> int:
        return max(0, waiting - self._tokens)

    def _share(self, rate: float) -> float:
        """The others ask for less than their share, and have it when they come, before those that
        wait; these share the rest (max-min fairness). But nobody has less than an equal share of
        all: some of the others may ask for nothing any more.
        """
        weight = self._weight or 1.0
        rest = 1 - self._others.rate / rate if rate else 0.0
        return max(rest / weight, 1 / (weight + self._others.weight))

    def _line(self, key: LineKey) -> Line:
        line = self._find(key)
        if line is None:
            line = self._new[key] = Line(self._weight_of(key))
        return line

    def _weight_of(self, key: LineKey) -> float:
        return self._weights.get(key[1], 1.0)

    def _find(self, key: LineKey) -> Line | None:
        return self._new.get(key) or self._round.get(key)

    def _lines(self) -> Iterator[tuple[LineKey, Line]]:
        return chain(self._new.items(), self._round.items())

    def wake(self) -> None:
        """Jobs were put, or a load has ended: lines that waited for it may go on."""
        with self._changed:
            self._changed.notify()

    def take(self, budget: int, hold: Hold) -> Taken:
        """Jobs of at most `budget` tokens together, or a single longer one, with their slots held.

        Waits for the first that can go, and for no second. Empty only when the queue is closed.
        """
        with self._changed:
            while True:
                taken = self._deal(budget, hold)
                if taken or self._closed:
                    return taken
                self._changed.wait()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _deal(self, budget: int, hold: Hold) -> Taken:
        taken, left = Taken(), budget
        turns = deque([*self._new, *self._round])
        while turns and left > 0:
            key = turns.popleft()
            line = self._new.get(key) or self._round[key]
            if not line.jobs:
                del self._round[key]  # a whole round without a job
                continue
            if self._hold(line, hold, taken):
                if line.deficit < line.jobs[0].tokens:  # else a full batch cut its last turn short
                    line.deficit += QUANTUM * line.weight
                sent = self._send(line, left, taken)
                self._lately.note(key, sent)
                left -= sent
            elif line.jobs:
                continue  # until its load is done
            if not line.jobs:
                line.deficit = 0.0
            if not line.jobs or line.deficit < line.jobs[0].tokens:
                self._end_turn(key, line)
                turns.append(key)
        self._reckon(taken)
        return taken

    def _reckon(self, taken: Taken) -> None:
        """What the lines' waits are told from, after these have gone."""
        gone = [*taken.jobs, *taken.unwanted, *(job for job, _ in taken.failed)]
        self._tokens -= sum(job.tokens for job in gone)
        waiting = {key: line for key, line in self._lines() if line.jobs}
        self._longest = max((line.tokens / line.weight for line in waiting.values()), default=0.0)
        now = time.monotonic()
        if now >= self._others.since + OTHERS_S:
            rates = self._lately.rates(now)
            keys = rates.keys() - waiting.keys()
            weight = sum(map(self._weight_of, keys))
            self._others = Others(keys, sum(rates[key] for key in keys), weight, now)
        known = self._others.keys
        self._weight = sum(line.weight for key, line in waiting.items() if key not in known)

    def _hold(self, line: Line, hold: Hold, taken: Taken) -> bool:
        """Whether the line's first job can go now; its slot is held then."""
        _drop_unwanted(line, taken)
        if not line.jobs:
            return False
        adapter = line.jobs[0].adapter
        if adapter is None or adapter.digest in taken.slots:
            return True
        try:
            slot = hold(adapter.digest)
        except TrunklineError as error:
            taken.failed += [(line.pop(), error) for _ in range(len(line.jobs))]
            return False
        if slot is None:
            return False
        taken.slots[adapter.digest] = slot
        return True

    def _send(self, line: Line, left: int, taken: Taken) -> int:
        """Move what the deficit and the batch allow; the tokens moved."""
        sent = 0
        while line.jobs:
            tokens = line.jobs[0].tokens
            fits = tokens <= left - sent or not taken.jobs
            if not fits or tokens > line.deficit:
                break
            taken.jobs.append(line.pop())
            line.deficit -= tokens
            sent += tokens
            _drop_unwanted(line, taken)
        return sent

    def _end_turn(self, key: LineKey, line: Line) -> None:
        self._new.pop(key, None)
        self._round[key] = line
        self._round.move_to_end(key)


def line_key(key: str, adapter: Version | None) -> LineKey:
    return (key, adapter.name, adapter.number) if adapter else (key, "", 0)


def _drop_unwanted(line: Line, taken: Taken) -> None:
    """Take the jobs off the line's head that nobody waits for, or that are late."""
    now = time.monotonic()
    while line.jobs and (line.jobs[0].reply.abandoned or line.jobs[0].deadline <= now):
        taken.unwanted.append(line.pop())
