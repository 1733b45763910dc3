"""The queue between admission and the device thread: bounded, fair over keys and adapters."""

import math
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
from server.engine.lately import PERIOD_S, Lately
from server.engine.outlook import Demand, Outlook, outlook
from server.engine.shares import Shares

# Tokens a line may send in one round: about one long row, so that rounds are short and whole.
QUANTUM = 512
# An outlook is made anew when so much of what it is made for has come since, or a batch has gone;
# of many lines no more often than OUTLOOK_S.
STALE = 0.02
OUTLOOK_S, MANY_LINES = 0.02, 64
# What comes is expected to be so many times what came lately: it goes before a line that is long,
# so a machine that gets slower gets slower for that line alone.
CAUTION = 1.25

Hold = Callable[[str, str], Slot | None]  # digest, API key: SlotPool.hold


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
class _Seen:
    """An outlook, and when it was made of what."""

    outlook: Outlook
    demands: Mapping[LineKey, Demand]
    most_s: float
    tokens: int
    deals: int
    at: float  # time.monotonic()


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
        self._weights = Shares(weights or {})
        # In the order of their turns; all of the new before any of the round. One that was emptied
        # stays in the round until its turn would come, so that it is not new again before that.
        self._new: OrderedDict[LineKey, Line] = OrderedDict()
        self._round: OrderedDict[LineKey, Line] = OrderedDict()
        self._tokens = 0  # of all lines
        self._most = 0  # of one line
        self._longest = 0.0  # of one line, over its weight
        self._lately: Lately[LineKey] = Lately()
        self._deals = 0
        self._seen: _Seen | None = None
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(len(line.jobs) for _, line in self._lines())

    def put(self, jobs: Sequence[Job]) -> None:
        """`wake` is to follow; a device thread that is awake may take them before it."""
        with self._changed:
            for job in jobs:
                line = self._line(line_key(job.key, job.adapter))
                line.jobs.append(job)
                line.tokens += job.tokens
                self._tokens += job.tokens
                self._most = max(self._most, line.tokens)
                self._longest = max(self._longest, line.tokens / line.weight)

    def lateness(self, keys: Iterable[LineKey], waiting: int, rate: float, most_s: float) -> float:
        """Seconds by which a new job's turn would come after `most_s`; 0 where it comes in time.

        Of the longest of these lines; of `waiting` tokens in all, before a device that runs `rate`
        a second.
        """
        with self._changed:
            on_device = max(0, waiting - self._tokens)
            if on_device > rate * most_s:
                return on_device / rate - most_s
            outlook, demands = self._outlook(on_device, rate, most_s)
            return max((self._late_s(key, outlook, demands) for key in keys), default=0.0)

    def may_be_late(self, waiting: int, rate: float, most_s: float) -> bool:
        """Whether there is a line of which lateness may be above 0."""
        with self._changed:
            on_device = max(0, waiting - self._tokens)
            if on_device > rate * most_s:
                return True
            outlook, _ = self._outlook(on_device, rate, most_s)
            if math.isinf(outlook.reach):
                return self._most > outlook.spare
            return self._longest > outlook.reach

    def longest(self, keys: Iterable[LineKey] | None = None) -> int:
        """Tokens that wait in the longest of these lines, or of all."""
        with self._changed:
            if keys is None:
                return self._most
            return max((line.tokens for key in keys if (line := self._find(key))), default=0)

    def _late_s(self, key: LineKey, outlook: Outlook, demands: Mapping[LineKey, Demand]) -> float:
        line = self._find(key)
        if line is None:
            return 0.0
        if math.isinf(outlook.reach):
            expected = demands[key].tokens if key in demands else 0.0
            return max(0.0, line.tokens - expected - outlook.spare) * outlook.slope
        return max(0.0, line.tokens / line.weight - outlook.reach) * outlook.slope

    def _outlook(
        self, on_device: int, rate: float, most_s: float
    ) -> tuple[Outlook, Mapping[LineKey, Demand]]:
        """That of now, or of a moment ago."""
        now, capacity = time.monotonic(), rate * most_s - on_device
        seen = self._seen
        if seen is not None and seen.most_s == most_s:
            same = seen.deals == self._deals and abs(self._tokens - seen.tokens) < STALE * capacity
            same &= now < seen.at + PERIOD_S  # what was given lately is forgotten by then
            if same or (len(seen.demands) > MANY_LINES and now < seen.at + OUTLOOK_S):
                return seen.outlook, seen.demands
        coming = {key: CAUTION * each for key, each in self._lately.rates(now).items()}
        demands = {
            key: Demand(each * most_s, self._weight_of(key), each) for key, each in coming.items()
        }
        for key, line in self._lines():
            if line.jobs:
                each = coming.get(key, 0.0)
                demands[key] = Demand(line.tokens + each * most_s, line.weight, each)
        made = outlook(demands.values(), capacity, rate)
        if seen is None or most_s >= seen.most_s:  # that of a nearer deadline is not kept
            self._seen = _Seen(made, demands, most_s, self._tokens, self._deals, now)
        return made, demands

    def _line(self, key: LineKey) -> Line:
        line = self._find(key)
        if line is None:
            line = self._new[key] = Line(self._weight_of(key))
        return line

    def _weight_of(self, key: LineKey) -> float:
        return self._weights.of(key[1])

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
                if sent:
                    self._lately.note(key, sent, time.monotonic())
                left -= sent
            elif line.jobs:
                continue  # until its load is done
            if not line.jobs:
                line.deficit = 0.0
            if not line.jobs or line.deficit < line.jobs[0].tokens:
                self._end_turn(key, line)
                turns.append(key)
        gone = [*taken.jobs, *taken.unwanted, *(job for job, _ in taken.failed)]
        self._tokens -= sum(job.tokens for job in gone)
        waiting = [line for _, line in self._lines() if line.jobs]
        self._most = max((line.tokens for line in waiting), default=0)
        self._longest = max((line.tokens / line.weight for line in waiting), default=0.0)
        self._deals += 1
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
            slot = hold(adapter.digest, line.jobs[0].key)
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
