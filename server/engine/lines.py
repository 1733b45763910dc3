"""Lines: the waiting jobs of one key and adapter version, and all lines of one key."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from adapters.versions import Version
from server.engine.job import Job
from server.engine.rounds import Rounds

LineKey = tuple[str, str, int]  # API key's id, adapter's name (the base has ""), version


def line_key(key: str, adapter: Version | None) -> LineKey:
    return (key, adapter.name, adapter.number) if adapter else (key, "", 0)


@dataclass(eq=False)
class Line:
    """The waiting jobs of one key under one adapter version, first in, first out."""

    name: LineKey
    weight: float
    jobs: deque[Job] = field(default_factory=deque)
    tokens: int = 0
    deficit: float = 0.0
    in_turn: bool = False  # its turn has begun, and goes on in the next batch


@dataclass(eq=False)
class KeyLines:
    """The lines of one API key ("" for all requests without a key), with its own deficit.

    A line is in `rounds`, or in `cold` while the slots have not got its adapter.
    """

    key: str
    rounds: Rounds[LineKey, Line] = field(default_factory=Rounds)
    cold: dict[LineKey, tuple[Line, bool]] = field(default_factory=dict)  # with: it was new
    jobs: int = 0
    tokens: int = 0
    deficit: float = 0.0
    in_turn: bool = False

    def __iter__(self) -> Iterator[Line]:
        yield from self.rounds
        for line, _ in self.cold.values():
            yield line

    def get(self, name: LineKey) -> Line | None:
        return self.cold[name][0] if name in self.cold else self.rounds.get(name)

    def put(self, line: Line, job: Job) -> None:
        line.jobs.append(job)
        line.tokens += job.tokens
        self.jobs += 1
        self.tokens += job.tokens

    def pop(self, line: Line) -> Job:
        job = line.jobs.popleft()
        line.tokens -= job.tokens
        self.jobs -= 1
        self.tokens -= job.tokens
        return job

    def park(self, line: Line, was_new: bool) -> None:
        """Its adapter is not resident: the other lines go on without it."""
        self.cold[line.name] = line, was_new

    def unpark(self, name: LineKey) -> None:
        """Its load has ended: its turn comes first, as it would have."""
        line, was_new = self.cold.pop(name)
        self.rounds.put_back([(name, line, was_new)])

    def retry(self, name: LineKey) -> None:
        """Its load may have ended: its turn comes last, so that it holds up no others."""
        line, was_new = self.cold.pop(name)
        self.rounds.put_last(name, line, was_new)
