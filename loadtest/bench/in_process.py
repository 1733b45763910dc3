"""The server's engine in this process, without HTTP: what it runs can be timed, and run again."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapters.library import Library
from adapters.slots import SlotPool
from adapters.weights import placed_bytes
from loadtest.bench.plan import Plan
from loadtest.bench.trunk import Trunk
from server.engine.admission import Row
from server.engine.batcher import Batch
from server.engine.engine import Engine
from server.engine.forward import Forward
from server.engine.job import Ask, Floats, Result
from server.metrics import Metrics, Ran

ASK = Ask(frozenset({"embedding"}))
TIMEOUT_S = 120.0
MAX_TOKENS = 1 << 20  # of a request, and of all that wait


class RecordingForward(Forward):
    """Keeps the batches that it is given."""

    batches: list[Batch]

    def run(self, batch: Batch) -> list[Result]:
        self.batches.append(batch)
        return super().run(batch)

    def run_again(self, batches: Sequence[Batch]) -> float:
        """Tokens a second of these batches, one after the other; on the device thread."""
        began = time.perf_counter()
        for batch in batches:
            super().run(batch)
        tokens = sum(batch.packed.ids.shape[0] for batch in batches)
        return tokens / (time.perf_counter() - began)


class BatchTimes(Metrics):
    """The engine's metrics, which also note when each batch was done."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[float, int]] = []

    def batch(self, rows: Sequence[Ran], seconds: float) -> None:
        super().batch(rows, seconds)
        self.times.append((time.perf_counter(), sum(row.tokens for row in rows)))

    def rate(self, ends: float) -> float:
        """Tokens a second from the end of the first batch to the first end after `ends`."""
        counted = self.times[: max(2, 1 + sum(at < ends for at, _ in self.times))]
        return sum(tokens for _, tokens in counted[1:]) / (counted[-1][0] - counted[0][0])


@dataclass
class InProcess:
    engine: Engine
    library: Library
    forward: RecordingForward
    metrics: BatchTimes

    async def ask(self, rows: Sequence[Tensor], name: str) -> list[Floats]:
        """The pooled rows under one adapter. Raises a row's own error."""
        asked = [Row(ids.numpy(), name) for ids in rows]
        pooled = []
        for result in await self.engine.encode(asked, ASK, time.monotonic() + TIMEOUT_S):
            if result.error is not None:
                raise result.error
            assert result.embedding is not None
            pooled.append(result.embedding)
        return pooled

    async def ask_all(
        self, requests: Sequence[tuple[Sequence[Tensor], str]], at_once: int
    ) -> list[Batch]:
        """Each request once, in a closed loop; the batches that were made of them."""
        left: Iterator[tuple[Sequence[Tensor], str]] = iter(requests)
        self.forward.batches = []

        async def keep_asking() -> None:
            for rows, name in left:
                await self.ask(rows, name)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(keep_asking())
        return self.forward.batches


def open_library(plan: Plan, trunk: Trunk, folder: Path) -> Library:
    """With as many slots as the plan says, all of them of the shape's usual rank."""
    adapter = trunk.adapter_set(plan.shape.ranks[0], 0)
    capacity = plan.sizes.slots * placed_bytes(adapter, trunk.dtype)
    return Library(
        folder,
        trunk.backbone,
        trunk.encoder,
        lambda read: SlotPool(
            trunk.config,
            trunk.dtype,
            trunk.encoder.device,
            capacity_bytes=capacity,
            max_slots=plan.sizes.slots,
            read=read,
        ),
    )


@asynccontextmanager
async def engine_of(plan: Plan, trunk: Trunk, folder: Path) -> AsyncIterator[InProcess]:
    """An engine that runs on the data folder of a trunk, as `trunkline serve` would."""
    library = open_library(plan, trunk, folder)
    forward = RecordingForward(trunk.backbone, trunk.dtype, trunk.encoder.device)
    forward.batches = []
    metrics = BatchTimes()
    engine = Engine(
        trunk.backbone,
        library,
        forward,
        metrics,
        max_batch_tokens=plan.sizes.batch_tokens,
        max_queue_tokens=MAX_TOKENS,
        max_request_tokens=MAX_TOKENS,
        max_queue_s=TIMEOUT_S,
        fair_shares={},
    )
    engine.start()
    try:
        yield InProcess(engine, library, forward, metrics)
    finally:
        await engine.stop()
        library.close()
