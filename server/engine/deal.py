"""Deal: which jobs make up one batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from adapters.errors import TrunklineError
from adapters.slots import Slot
from server.engine.job import Job
from server.engine.lines import KeyLines, Line, LineKey
from server.engine.rounds import Rounds

# Tokens that a key, and within a key a line, may send in one round: about one long row, so that
# rounds are short and whole.
QUANTUM = 512
# A batch is full when this many lines had a next row that is too long for the rest of it: looking
# for a row that fits through thousands of lines would take longer than it saves.
MISFITS = 32
# Jobs without a forward (late, abandoned, or without their adapter) that one deal gives back. They
# cost no budget, and a client that leaves can leave many: the lock is not held for all of them.
GIVEN_BACK = 1024
# Lines of one key that one deal finds without their adapter, for the same reason.
COLD = 1024

Hold = Callable[[str, str], Slot | None]  # digest, API key: SlotPool.hold


@dataclass
class Taken:
    """What the device thread is to do next."""

    jobs: list[Job] = field(default_factory=list)
    slots: dict[str, Slot] = field(default_factory=dict)  # held for the jobs, by digest
    unwanted: list[Job] = field(default_factory=list)  # abandoned, or past their deadline
    failed: list[tuple[Job, TrunklineError]] = field(default_factory=list)  # no load for them

    def __bool__(self) -> bool:
        return bool(self.jobs or self.unwanted or self.failed)


class _Ended(Enum):
    """Why a line sends no more for now."""

    TURN = auto()  # it is empty, or has sent what it may in one turn
    KEY = auto()  # its key has sent what it may in one turn
    BATCH = auto()  # its next row does not fit
    COLD = auto()  # its adapter is not resident


class Deal:
    """One batch by deficit round robin (Shreedhar and Varghese 1995) over keys, then over lines.

    In its turn a key may send QUANTUM tokens more, and a line of it QUANTUM * weight. A turn that
    the end of the batch, or of the key's turn, cuts short goes on in the next.
    """

    def __init__(self, keys: Rounds[str, KeyLines], budget: int, hold: Hold, now: float) -> None:
        self.taken = Taken()
        self.sent: dict[LineKey, int] = {}  # tokens
        self.parked: list[tuple[KeyLines, LineKey, str]] = []  # with the digest to be loaded
        self._keys, self._left, self._hold = keys, budget, hold
        self.cut_short = False  # there may be jobs that could go, though the batch is not full
        self._misfits = self._given_back = 0
        self._now = now  # time.monotonic()

    def run(self) -> None:
        passed = []
        while self._goes_on() and self._keys:
            name, key, is_new = self._keys.first()
            if not key.jobs:
                continue  # a whole round without a job
            if self._turn_of_key(key):
                key.in_turn = False
                if not key.jobs:
                    key.deficit = 0.0
                self._keys.end_turn(name, key)
            else:
                passed.append((name, key, is_new))
        self._keys.put_back(passed)

    def _goes_on(self) -> bool:
        given_back = self._given_back
        return self._left > 0 and self._misfits < MISFITS and given_back < GIVEN_BACK

    def _turn_of_key(self, key: KeyLines) -> bool:
        """Whether its turn is over; else it goes on in the next batch."""
        if not key.in_turn:
            key.in_turn = True
            key.deficit += QUANTUM
        passed = []
        ended, most_parked = None, len(self.parked) + COLD
        while self._goes_on() and key.rounds and ended is not _Ended.KEY:
            if len(self.parked) >= most_parked:
                self.cut_short = True
                break
            name, line, is_new = key.rounds.first()
            if not line.jobs:
                continue
            ended = self._turn_of_line(key, line)
            if ended is _Ended.TURN:
                line.in_turn = False
                key.rounds.end_turn(name, line)
            elif ended is _Ended.COLD:
                key.park(line, is_new)
                self.parked.append((key, name, _digest(line.jobs[0])))
            else:
                passed.append((name, line, is_new))
        key.rounds.put_back(passed)
        return ended is _Ended.KEY or not key.jobs

    def _turn_of_line(self, key: KeyLines, line: Line) -> _Ended:
        if self._next_wanted(key, line):
            if not self._holds(key, line):
                return _Ended.COLD
            if not line.in_turn:
                line.in_turn = True
                line.deficit += QUANTUM * line.weight
        return self._send(key, line)

    def _holds(self, key: KeyLines, line: Line) -> bool:
        """Whether the line can go on: its slot is held, or its load failed and so its jobs did."""
        digest = _digest(line.jobs[0])
        if not digest or digest in self.taken.slots:
            return True
        try:
            slot = self._hold(digest, key.key)
        except TrunklineError as error:
            while line.jobs and self._given_back < GIVEN_BACK:
                self.taken.failed.append((key.pop(line), error))
                self._given_back += 1
            return True
        if slot is not None:
            self.taken.slots[digest] = slot
        return slot is not None

    def _send(self, key: KeyLines, line: Line) -> _Ended:
        """Move into the batch what both deficits and the batch allow."""
        sent, allowed = 0, min(line.deficit, key.deficit)
        while self._next_wanted(key, line):
            tokens = line.jobs[0].tokens
            if sent + tokens > allowed:
                break
            if sent + tokens > self._left and self.taken.jobs:
                self._misfits += 1
                break
            self.taken.jobs.append(key.pop(line))
            sent += tokens
        line.deficit -= sent
        key.deficit -= sent
        self._left -= sent
        if sent:
            self.sent[line.name] = self.sent.get(line.name, 0) + sent
        return self._why_ended(key, line)

    def _why_ended(self, key: KeyLines, line: Line) -> _Ended:
        if not line.jobs:
            line.deficit = 0.0
            return _Ended.TURN
        tokens = line.jobs[0].tokens
        if self._left <= 0 or self._given_back >= GIVEN_BACK:
            return _Ended.BATCH
        if tokens > line.deficit:
            return _Ended.TURN
        return _Ended.KEY if tokens > key.deficit else _Ended.BATCH

    def _next_wanted(self, key: KeyLines, line: Line) -> bool:
        """Whether the line's first job is to be run; those that nobody waits for any more, or
        that are late, are taken off before it."""
        while line.jobs and self._given_back < GIVEN_BACK:
            first = line.jobs[0]
            if not first.reply.abandoned and first.deadline > self._now:
                return True
            self.taken.unwanted.append(key.pop(line))
            self._given_back += 1
        return False


def _digest(job: Job) -> str:
    return job.adapter.digest if job.adapter else ""
