"""The queue between admission and the device thread: bounded, fair over keys and adapters."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from adapters.errors import TrunklineError
from adapters.slots import Slot
from adapters.versions import Version
from server.engine.job import Job

# Tokens a line may send in one round: about one long row, so that rounds are short and whole.
QUANTUM = 512

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
        self._weight = 0.0  # of the lines that have jobs
        self._tokens = 0  # of all lines
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(len(line.jobs) for line in self._lines())

    def put(self, jobs: Sequence[Job]) -> None:
        """`wake` is to follow; a device thread that is awake may take them before it."""
        with self._changed:
            for job in jobs:
                line = self._line(job)
                if not line.jobs:
                    self._weight += line.weight
                line.jobs.append(job)
                line.tokens += job.tokens
                self._tokens += job.tokens

    def ahead(self, keys: Iterable[LineKey], waiting: int) -> float:
        """Tokens that run before a new job of these lines, at most; of `waiting` in all.

        First what is on the device, then the line's own jobs, between which others' are dealt: its
        tokens over its share. Never more than all there are.
        """
        with self._changed:
            on_device = max(0, waiting - self._tokens)
            return min(waiting, on_device + max(map(self._ahead, keys)))

    def _ahead(self, key: LineKey) -> float:
        line = self._find(key)
        return line.tokens * self._weight / line.weight if line is not None else 0.0

    def _line(self, job: Job) -> Line:
        key = line_key(job.key, job.adapter)
        line = self._find(key)
        if line is None:
            line = self._new[key] = Line(self._weights.get(key[1], 1.0))
        return line

    def _find(self, key: LineKey) -> Line | None:
        return self._new.get(key) or self._round.get(key)

    def _lines(self) -> Iterator[Line]:
        return chain(self._new.values(), self._round.values())

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
                left -= self._send(line, left, taken)
            elif line.jobs:
                continue  # until its load is done
            if not line.jobs:
                line.deficit = 0.0
            if not line.jobs or line.deficit < line.jobs[0].tokens:
                self._end_turn(key, line)
                turns.append(key)
        self._weight = sum(line.weight for line in self._lines() if line.jobs)
        gone = [*taken.jobs, *taken.unwanted, *(job for job, _ in taken.failed)]
        self._tokens -= sum(job.tokens for job in gone)
        return taken

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
