"""What was offered to a server by an open loop, and what became of it."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from loadtest.bench.client import Question, Sent, post
from loadtest.bench.trunk import Trunk, mixed_lengths

TEXTS = 96
DEADLINE_MS = 10_000


@dataclass(frozen=True)
class Span:
    """What of an open loop is counted: after the lead, in which the queue fills, and before the
    end, after which it only empties."""

    lead_s: float
    ends_s: float

    @classmethod
    def of(cls, window_s: float) -> "Span":
        """So long, after half of it."""
        return cls(window_s / 2, 1.5 * window_s)

    def __contains__(self, at: float) -> bool:
        return self.lead_s <= at < self.ends_s


@dataclass(frozen=True)
class Point:
    """One load: how much was offered and what became of it. Rates are requests a second."""

    name: str
    offered: float
    good: float  # answered with 200 while it lasted, whenever they were due
    statuses: Counter[int]  # of those due while it lasted, as the rest
    refused_without_time: int  # 503 and 429 without a Retry-After
    latencies: Sequence[float]  # s, of the answered, sorted

    @property
    def answered(self) -> float:
        """The share of what was offered; NaN where nothing was."""
        offered = self.statuses.total()
        return self.statuses[200] / offered if offered else math.nan

    def percentile(self, percent: float) -> float:
        """NaN where nothing was answered."""
        if not self.latencies:
            return math.nan
        return self.latencies[
            min(len(self.latencies) - 1, int(len(self.latencies) * percent / 100))
        ]


def point(name: str, sent: Sequence[Sent], span: Span) -> Point:
    seconds = span.ends_s - span.lead_s
    due = [each for each in sent if each.due in span]
    refused = [each.answer for each in due if each.answer.status in (429, 503)]
    return Point(
        name,
        len(due) / seconds,
        sum(each.answer.status == 200 and each.done in span for each in sent) / seconds,
        Counter(each.answer.status for each in due),
        sum(b"retry-after:" not in answer.head.lower() for answer in refused),
        sorted(each.seconds for each in due if each.answer.status == 200),
    )


def merged(points: Sequence[Point]) -> Point:
    """The same load, offered several times for as long."""
    return Point(
        points[0].name,
        fmean(each.offered for each in points),
        fmean(each.good for each in points),
        sum((each.statuses for each in points), Counter()),
        sum(each.refused_without_time for each in points),
        sorted(chain.from_iterable(each.latencies for each in points)),
    )


def questions(trunk: Trunk, key: str, seed: int, names: Sequence[str | None]) -> list[Question]:
    """Rows of mixed lengths as one key sends them, each under one of these adapters (None: the
    trunk alone)."""
    dice = random.Random(seed)
    asked = []
    for length in mixed_lengths(TEXTS * 400, seed)[:TEXTS]:
        ids = [dice.randrange(trunk.config.vocab_size) for _ in range(length)]
        body = {"adapter": dice.choice(names), "inputs": ids, "timeout_ms": DEADLINE_MS}
        # tokens=1: rates are of requests
        asked.append(post("/encode", body, "application/octet-stream", 1, key))
    return asked


def table(points: Sequence[Point], first: str, column: str, cells: Sequence[str]) -> str:
    """A row a point; `cells` are those of the column that the points do not tell."""
    lines = [
        f"| {first} | offered/s | answered/s | {column} | refused | p50 | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each, cell in zip(points, cells, strict=True):
        refused = ", ".join(
            f"{count} × {status}"
            for status, count in sorted(each.statuses.items())
            if status != 200
        )
        lines.append(
            f"| {each.name} | {each.offered:.0f} | {each.good:.0f} | {cell} "
            f"| {refused or 'none'} | {each.percentile(50):.2f} s | {each.percentile(99):.2f} s |"
        )
    return "\n".join(lines) + "\n"
