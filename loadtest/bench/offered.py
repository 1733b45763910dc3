"""What was offered to a server by an open loop, and what became of it."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.bench.client import Answer, Question, post
from loadtest.bench.trunk import Trunk, mixed_lengths

TEXTS = 96
DEADLINE_MS = 10_000


@dataclass(frozen=True)
class Point:
    """One load: how much was offered and what became of it. Rates are requests a second."""

    name: str
    offered: float
    good: float
    statuses: Counter[int]
    refused_without_time: int  # 503 and 429 without a Retry-After
    latencies: Sequence[float]  # s, of the answered, sorted

    @property
    def answered(self) -> float:
        """The share of what was offered; NaN where nothing was."""
        return self.good / self.offered if self.offered else math.nan

    def percentile(self, percent: float) -> float:
        """NaN where nothing was answered."""
        if not self.latencies:
            return math.nan
        return self.latencies[
            min(len(self.latencies) - 1, int(len(self.latencies) * percent / 100))
        ]


def point(name: str, answers: Sequence[tuple[int, Answer, float]], window_s: float) -> Point:
    good = sorted(seconds for _, answer, seconds in answers if answer.status == 200)
    refused = [answer for _, answer, _ in answers if answer.status in (429, 503)]
    untimed = [answer for answer in refused if b"retry-after:" not in answer.head.lower()]
    return Point(
        name,
        len(answers) / window_s,
        len(good) / window_s,
        Counter(answer.status for _, answer, _ in answers),
        len(untimed),
        good,
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


def table(points: Sequence[Point], first: str) -> str:
    peak = max(each.good for each in points)
    lines = [
        f"| {first} | offered/s | answered/s | of the peak | refused | p50 | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in points:
        refused = ", ".join(
            f"{count} × {status}"
            for status, count in sorted(each.statuses.items())
            if status != 200
        )
        lines.append(
            f"| {each.name} | {each.offered:.0f} | {each.good:.0f} | {each.good / peak:.2f} "
            f"| {refused or 'none'} | {each.percentile(50):.2f} s | {each.percentile(99):.2f} s |"
        )
    return "\n".join(lines) + "\n"
