"""The one thread that owns the device."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from server.engine.batcher import form_batch
from server.engine.errors import DeadlineExceeded, NotReady
from server.engine.forward import Forward
from server.engine.job import Job, Result
from server.engine.queue import JobQueue
from server.metrics import Metrics

log = logging.getLogger("trunkline.engine")


class EngineLoop:
    """take, form, run, reply: a batch starts as soon as the device is free."""

    def __init__(
        self,
        queue: JobQueue,
        forward: Forward,
        max_batch_tokens: int,
        events: asyncio.AbstractEventLoop,
        metrics: Metrics,
    ) -> None:
        self.queue, self.forward, self.max_batch_tokens = queue, forward, max_batch_tokens
        self.events, self.metrics = events, metrics
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stopping = False
        self.busy_since: float | None = None  # time.monotonic() of the batch under way

    def _run(self) -> None:
        while not self.stopping:
            self.step()

    def step(self) -> None:
        jobs = self._drop_unwanted(self.queue.take(self.max_batch_tokens))
        if not jobs:
            return
        self.busy_since = began = time.monotonic()
        batch = form_batch(jobs, self.forward.encoder.device)
        try:
            results = self.forward.run(batch)
        except Exception:
            log.exception("a batch of %d rows failed", len(jobs))
            broken = NotReady("the forward failed; the server's log says why")
            results = [Result(job.adapter, error=broken) for job in batch.jobs]
        self.busy_since = None
        self.metrics.batch(batch.packed.ids.shape[0], len(jobs), time.monotonic() - began)
        self._reply(batch.jobs, results, began)

    def _drop_unwanted(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs whose client still waits and whose deadline is not over; the others end here."""
        now = time.monotonic()
        unwanted = [job for job in jobs if job.reply.abandoned or job.deadline <= now]
        late = DeadlineExceeded("the deadline was over before the forward; none was run")
        self._reply(unwanted, [Result(job.adapter, error=late) for job in unwanted], now)
        return [job for job in jobs if not (job.reply.abandoned or job.deadline <= now)]

    def _reply(self, jobs: Sequence[Job], results: Sequence[Result], began: float) -> None:
        forward_ms = (time.monotonic() - began) * 1e3
        for job, result in zip(jobs, results, strict=True):
            result.queue_ms = (began - job.admitted) * 1e3
            result.forward_ms = forward_ms
            job.release()
        if jobs:
            self.events.call_soon_threadsafe(_deliver, jobs, results)


def _deliver(jobs: Sequence[Job], results: Sequence[Result]) -> None:
    for job, result in zip(jobs, results, strict=True):
        job.reply.put(job.row, result)
