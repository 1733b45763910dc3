"""The one thread that owns the device."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from adapters.errors import TrunklineError
from adapters.slots import SlotPool
from server.engine.batcher import Batch, form_batch
from server.engine.errors import DeadlineExceeded, NotReady
from server.engine.forward import Forward
from server.engine.job import Job, Result
from server.engine.queue import JobQueue, Taken
from server.metrics import Metrics

log = logging.getLogger("trunkline.engine")


class EngineLoop:
    """take, form, run, reply: a batch starts as soon as the device is free."""

    def __init__(
        self,
        queue: JobQueue,
        slots: SlotPool,
        forward: Forward,
        max_batch_tokens: int,
        events: asyncio.AbstractEventLoop,
        metrics: Metrics,
    ) -> None:
        self.queue, self.slots, self.forward = queue, slots, forward
        self.max_batch_tokens = max_batch_tokens
        self.events, self.metrics = events, metrics
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stopping = False
        self.busy_since: float | None = None  # time.monotonic() of the batch under way

    def _run(self) -> None:
        while not self.stopping:
            self.step()

    def step(self) -> None:
        taken = self.queue.take(self.max_batch_tokens, self.slots.hold)
        self._refuse(taken)
        if not taken.jobs:
            return
        self.busy_since = began = time.monotonic()
        try:
            batch = form_batch(taken.jobs, taken.slots, self.forward.encoder.device)
            results = self._run_batch(batch)
        finally:
            self.slots.let_go(taken.slots.values())
            self.busy_since = None
        self.metrics.batch(batch.packed.ids.shape[0], len(batch.jobs), time.monotonic() - began)
        self._reply(batch.jobs, results, began)

    def _run_batch(self, batch: Batch) -> list[Result]:
        try:
            return self.forward.run(batch)
        except Exception:
            log.exception("a batch of %d rows failed", len(batch.jobs))
            broken = NotReady("the forward failed; the server's log says why")
            return [Result(job.adapter, error=broken) for job in batch.jobs]

    def _refuse(self, taken: Taken) -> None:
        """Answer the jobs that no forward is run for: late, abandoned, or without an adapter."""
        late = DeadlineExceeded("the deadline was over before the forward; none was run")
        refused: list[tuple[Job, TrunklineError]] = [(job, late) for job in taken.unwanted]
        refused += taken.failed
        results = [Result(job.adapter, error=error) for job, error in refused]
        self._reply([job for job, _ in refused], results, time.monotonic())

    def _reply(self, jobs: Sequence[Job], results: Sequence[Result], began: float) -> None:
        forward_ms = (time.monotonic() - began) * 1e3
        for job, result in zip(jobs, results, strict=True):
            result.queue_ms = (began - job.admitted) * 1e3
            result.forward_ms = forward_ms
            job.weights = None
            job.release()
        if jobs:
            self.events.call_soon_threadsafe(_deliver, jobs, results)


def _deliver(jobs: Sequence[Job], results: Sequence[Result]) -> None:
    for job, result in zip(jobs, results, strict=True):
        job.reply.put(job.row, result)
