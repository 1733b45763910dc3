"""The queue between admission and the device thread: bounded, fair over keys, then adapters."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from server.engine.deal import Deal, Hold, Taken
from server.engine.forecast import Forecast, Moment
from server.engine.job import Job
from server.engine.lines import KeyLines, Line, LineKey, line_key
from server.engine.rounds import Rounds
from server.engine.shares import Shares

# Lines that wait for a load are asked for again when the load has ended, and for certainty after
# RETRY_S, and RETRY_LINE_S more for each such line: thousands of them must not cost the device's
# time with every batch.
RETRY_S, RETRY_LINE_S = 0.05, 200e-6


class JobQueue:
    """Two levels of round robin: over API keys, and within a key over its lines.

    A line is what waits of one key under one adapter version. A hot adapter can't starve the
    others of its key, nor can a key, with however many adapters, starve other keys. A key that had
    nothing waiting in the last round has its turn at once, and so has such a line within its key.
    A line whose adapter is not resident waits, alone, until its load is done.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = Shares(weights or {})
        self._keys: Rounds[str, KeyLines] = Rounds()
        self._forecast = Forecast(self._keys, self._weight_of)
        self._jobs = self._tokens = 0  # of all keys
        self._deals = 0
        self._cold: defaultdict[str, list[tuple[KeyLines, LineKey]]] = defaultdict(list)  # digest
        self._retried = 0.0  # time.monotonic()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return self._jobs

    def put(self, jobs: Sequence[Job]) -> None:
        """`wake` is to follow; a device thread that is awake may take them before it."""
        with self._changed:
            for job in jobs:
                key, line = self._line(line_key(job.key, job.adapter))
                key.put(line, job)
                self._tokens += job.tokens
            self._jobs += len(jobs)

    def lateness(self, lines: Iterable[LineKey], waiting: int, rate: float, most_s: float) -> float:
        """Seconds by which a new job's turn would come after `most_s`; 0 where it comes in time.

        The greatest of these lines; with `waiting` tokens in all before a device that runs `rate`
        a second.
        """
        with self._changed:
            return self._forecast.late_s(lines, self._moment(waiting, rate, most_s))

    def may_be_late(self, waiting: int, rate: float, most_s: float) -> bool:
        """Whether there is a line of which lateness may be above 0."""
        with self._changed:
            return self._forecast.may_be_late(self._moment(waiting, rate, most_s))

    def longest(self, lines: Iterable[LineKey]) -> int:
        """Tokens that wait in the longest of these lines."""
        with self._changed:
            found = (self._find(line) for line in lines)
            return max((line.tokens for line in found if line is not None), default=0)

    def wake(self) -> None:
        """Jobs were put."""
        with self._changed:
            self._changed.notify()

    def loaded(self, digest: str) -> None:
        """A load has ended, well or not: lines that waited for it may go on."""
        with self._changed:
            for key, line in self._cold.pop(digest, ()):
                key.unpark(line)
            self._changed.notify()

    def take(self, budget: int, hold: Hold) -> Taken:
        """Jobs of at most `budget` tokens together, or a single longer one, with their slots held.

        Waits for the first that can go, and for no second. Empty only when the queue is closed.
        """
        with self._changed:
            while True:
                deal = self._deal(budget, hold)
                if deal.taken or self._closed:
                    return deal.taken
                if deal.cut_short:
                    self._changed.wait(0)  # lets others at the queue
                else:
                    self._changed.wait(self._retry_s if self._cold else None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _moment(self, waiting: int, rate: float, most_s: float) -> Moment:
        on_device = max(0, waiting - self._tokens)
        return Moment(on_device, self._tokens, self._deals, rate, most_s, time.monotonic())

    def _line(self, name: LineKey) -> tuple[KeyLines, Line]:
        """Found, or made as a new one."""
        key = self._keys.get(name[0])
        if key is None:
            key = KeyLines(name[0])
            self._keys.add(name[0], key)
        line = key.get(name)
        if line is None:
            line = Line(name, self._weight_of(name))
            key.rounds.add(name, line)
        return key, line

    def _find(self, name: LineKey) -> Line | None:
        key = self._keys.get(name[0])
        return key.get(name) if key is not None else None

    def _weight_of(self, name: LineKey) -> float:
        return self._weights.of(name[1])

    def _deal(self, budget: int, hold: Hold) -> Deal:
        now = time.monotonic()
        if not self._cold:
            self._retried = now
        elif now > self._retried + self._retry_s:
            self._retry_cold(now)
        deal = Deal(self._keys, budget, hold, now)
        deal.run()
        for key, line, digest in deal.parked:
            self._cold[digest].append((key, line))
        taken = deal.taken
        gone = [*taken.jobs, *taken.unwanted, *(job for job, _ in taken.failed)]
        self._jobs -= len(gone)
        self._tokens -= sum(job.tokens for job in gone)
        self._forecast.dealt(deal.sent, now)
        self._deals += 1
        return deal

    @property
    def _retry_s(self) -> float:
        return RETRY_S + RETRY_LINE_S * len(self._cold)

    def _retry_cold(self, now: float) -> None:
        self._retried = now
        for lines in self._cold.values():
            for key, line in lines:
                key.retry(line)
        self._cold.clear()
