"""How long the admitted wait: admission and queue before a simulated device, minutes in seconds.

Arrivals are open loops with Poisson times; the device's rate varies from batch to batch and over
seconds, as a shared machine's does. Nothing sleeps: the clock is told.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY

from server.engine import admission, queue
from server.engine.admission import Admission, Row
from server.engine.errors import Overloaded
from server.engine.job import Ask, Job
from server.engine.loop import BACKLOG_S
from server.engine.permits import TokenPermits
from server.engine.queue import JobQueue
from server.engine.rate import DrainRate

ASK = Ask(frozenset({"embedding"}))
RATE = 20_000  # tokens a second
BATCH = 4096  # tokens
MAX_WAIT_S = 2.0
WARM_S, ENDS_S = 8.0, 30.0
LENGTHS = (8, 16, 24, 32, 48, 64, 64, 64)


@dataclass(frozen=True)
class Asker:
    """Rows of one key, their adapters drawn by weight, `times` what the device can do."""

    key: str
    times: float
    weights: Sequence[float]

    def arrivals(self, seed: int, ends_s: float) -> Iterator[tuple[float, str, int, int]]:
        """(when in s, key, adapter's number, tokens)"""
        dice, at = random.Random(seed), 0.0
        rows_a_second = self.times * RATE * len(LENGTHS) / sum(LENGTHS)
        while (at := at + dice.expovariate(rows_a_second)) < ends_s:
            adapter = dice.choices(range(len(self.weights)), self.weights)[0]
            yield at, self.key, adapter, dice.choice(LENGTHS)


@dataclass
class Seen:
    """What became of one key's rows after the warm-up."""

    waits: list[float]
    refused: int = 0

    def percentile(self, percent: float) -> float:
        return sorted(self.waits)[int(len(self.waits) * percent / 100)]


class Simulation:
    """The engine's loop on a clock of its own."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        askers: Sequence[Asker],
        ends_s: float = ENDS_S,
    ) -> None:
        self.now = 0.0
        self.requests: list[tuple[float, str, list[Row]]] = []  # of many rows, at these times
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(queue, "time", clock)
        monkeypatch.setattr(admission, "time", clock)
        self.queue, self.rate, self.noise = JobQueue(), DrainRate(), random.Random(0)
        backbone: Any = SimpleNamespace(config=TINY, tensors={})
        permits = TokenPermits(1 << 20)
        self.admission = Admission(
            self, backbone, permits, self.queue, self.rate, 1 << 20, MAX_WAIT_S
        )
        self.arrivals = sorted(
            arrival for seed, asker in enumerate(askers) for arrival in asker.arrivals(seed, ends_s)
        )
        self.seen = {asker.key: Seen([]) for asker in askers}
        self.busy_s = 0.0

    def version(self, name: str) -> Any:
        return SimpleNamespace(name=name, number=1, digest=name, manifest=None)

    def lease(self, name: str, key: str) -> Any:
        return self.version(name), SimpleNamespace(release=lambda: None)

    def run(self) -> None:
        coming, ended = iter(self.arrivals), 0.0
        following = next(coming, None)
        while following is not None or self.admission.permits.held:
            if following is not None and not len(self.queue):
                self.now = max(self.now, following[0])
            while following is not None and following[0] <= self.now:
                self.ask(*following)
                following = next(coming, None)
            while self.requests and self.requests[0][0] <= self.now:
                self.ask_rows(*self.requests.pop(0))
            taken = self.queue.take(BATCH, lambda digest, key: SimpleNamespace())  # type: ignore[arg-type,return-value]
            assert not taken.unwanted, "a deadline passed in the queue"
            ended = self.run_batch(taken.jobs, ended)

    def ask(self, at: float, key: str, adapter: int, tokens: int) -> None:
        self.ask_rows(at, key, [Row(np.zeros(tokens, dtype=np.int64), str(adapter))])

    def ask_rows(self, at: float, key: str, rows: Sequence[Row]) -> None:
        try:
            jobs, _ = self.admission.admit(rows, ASK, self.now + 30, key)
        except Overloaded:
            self.seen[key].refused += at >= WARM_S
            return
        for job in jobs:
            job.admitted = at
        self.queue.put(jobs)

    def run_batch(self, jobs: Sequence[Job], ended: float) -> float:
        """When it has ended, as EngineLoop.step notes it."""
        began, tokens = self.now, sum(job.tokens for job in jobs)
        oldest = min(job.admitted for job in jobs)
        slow = self.noise.lognormvariate(0, 0.2) * (1.2 if began % 6 < 3 else 0.8)
        self.now += 0.003 + tokens / RATE * slow
        self.busy_s += min(self.now, ENDS_S) - min(began, ENDS_S)
        if 2 * tokens >= BATCH or began - oldest > BACKLOG_S:
            self.rate.note(tokens, self.now - max(ended, oldest))
        for job in jobs:
            job.release()
            if job.admitted >= WARM_S:
                self.seen[job.key].waits.append(self.now - job.admitted)
        return self.now


pytestmark = pytest.mark.usefixtures("event_loop")


EVEN = [1.0] * 9
UNEVEN = [3.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.2, 0.2, 0.1]
ZIPF = [1 / rank for rank in range(1, 101)]


@pytest.mark.parametrize("times", [1.0, 1.2, 1.5, 3.0])
@pytest.mark.parametrize("weights", [EVEN, UNEVEN, ZIPF], ids=["even", "uneven", "zipf"])
def test_the_admitted_wait_little_longer_than_they_may(
    monkeypatch: pytest.MonkeyPatch, weights: Sequence[float], times: float
) -> None:
    simulation = Simulation(monkeypatch, [Asker("any", times, weights)])
    simulation.run()
    assert simulation.seen["any"].percentile(99) < 1.5 * MAX_WAIT_S + BATCH / RATE
    if times > 1:  # and no more is refused than must be: the device is never without work
        assert simulation.busy_s > 0.97 * ENDS_S
        assert simulation.seen["any"].refused


def test_beside_a_flood_the_quiet_are_refused_nothing_and_wait_for_few_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulation = Simulation(monkeypatch, [Asker("loud", 2.0, UNEVEN), Asker("quiet", 0.1, UNEVEN)])
    simulation.run()
    loud, quiet = simulation.seen["loud"], simulation.seen["quiet"]
    assert (quiet.refused, loud.refused > 0) == (0, True)
    assert quiet.percentile(99) < 4 * BATCH / RATE
    assert loud.percentile(99) < 1.5 * MAX_WAIT_S + BATCH / RATE


@pytest.mark.parametrize("adapters", [1, 16, 64, 200])
def test_beside_a_flood_over_many_adapters_a_quiet_key_is_refused_nothing(
    monkeypatch: pytest.MonkeyPatch, adapters: int
) -> None:
    flood = Asker("loud", 1.5, [1.0] * adapters)
    simulation = Simulation(monkeypatch, [flood, Asker("quiet", 0.1, [1.0])], ends_s=10.0)
    simulation.run()
    loud, quiet = simulation.seen["loud"], simulation.seen["quiet"]
    assert (quiet.refused, loud.refused > 0) == (0, True)
    assert quiet.percentile(99) < 4 * BATCH / RATE


def test_beside_fan_out_requests_a_quiet_key_is_refused_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulation = Simulation(monkeypatch, [Asker("quiet", 0.1, [1.0])], ends_s=14.0)
    simulation.seen["loud"] = Seen([])
    # 64 adapters x 32 rows of 64 tokens: 131,072, the most of one request
    rows = [Row(np.zeros(64, dtype=np.int64), str(number % 64)) for number in range(2048)]
    simulation.requests = [(at, "loud", rows) for at in range(0, 14)]
    simulation.run()
    quiet = simulation.seen["quiet"]
    assert quiet.refused == 0
    assert simulation.seen["loud"].waits
    assert quiet.percentile(99) < 4 * BATCH / RATE


def test_a_load_that_comes_and_goes_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, [Asker("any", 3.0, UNEVEN)])
    simulation.arrivals = [
        arrival
        for number, arrival in enumerate(simulation.arrivals)
        if arrival[0] % 10 < 5 or number % 6 == 0  # half of what the device can do, and thrice that
    ]
    simulation.run()
    assert simulation.seen["any"].percentile(99) < 1.5 * MAX_WAIT_S + BATCH / RATE
