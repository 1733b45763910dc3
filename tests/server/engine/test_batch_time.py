"""A batch has so many tokens as the device does soon, or fewer."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from server.engine.batcher import Batch
from server.engine.job import Ask, Job, Reply, Result
from server.engine.loop import BATCH_S, LEAST_TOKENS, EngineLoop
from server.engine.queue import JobQueue
from server.engine.rate import DrainRate
from server.metrics import Metrics

MOST = 4096  # tokens of a batch
ROW = 64


class Device:
    """Notes the tokens of the batches that it is given."""

    def __init__(self) -> None:
        self.encoder = SimpleNamespace(device="cpu")
        self.tokens = 0

    def run(self, batch: Batch) -> list[Result]:
        self.tokens = sum(job.tokens for job in batch.jobs)
        return [Result(None) for _ in batch.jobs]


def job() -> Job:
    ask, ids = Ask(frozenset({"embedding"})), np.zeros(ROW, dtype=np.int64)
    now = time.monotonic()
    return Job(ids, ask, None, now + 60, now, Reply(1), 0, lambda: None)


@pytest.mark.parametrize(
    ("rate", "tokens"),
    [
        (None, MOST),  # not known yet
        (1_000_000, MOST),
        (8 * LEAST_TOKENS, int(8 * LEAST_TOKENS * BATCH_S)),
        (10, LEAST_TOKENS),
    ],
)
def test_a_slow_device_gets_batches_that_end_soon(rate: int | None, tokens: int) -> None:
    async def one_batch() -> int:
        queue, drained, device = JobQueue(), DrainRate(), Device()
        if rate is not None:
            drained.note(rate * 60, 60.0)
        slots: Any = SimpleNamespace(hold=None, let_go=lambda slots: None)
        forward: Any = device
        events = asyncio.get_running_loop()
        loop = EngineLoop(queue, slots, forward, MOST, events, Metrics(), drained)
        queue.put([job() for _ in range(2 * MOST // ROW)])
        loop.step()
        return device.tokens

    assert asyncio.run(one_batch()) == tokens
