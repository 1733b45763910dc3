"""The one thread that owns the device."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from adapters.errors import TrunklineError
from adapters.names import BASE
from adapters.slots import Slot, SlotPool
from server.engine.batcher import form_batch
from server.engine.deal import Taken
from server.engine.errors import DeadlineExceeded, Overloaded
from server.engine.forward import Forward
from server.engine.job import Job, Result
from server.engine.queue import JobQueue
from server.engine.rate import DrainRate
from server.metrics import Metrics, Ran

log = logging.getLogger("trunkline.engine")


# A batch takes about so long at most, since whoever comes next waits for it: on a slow device it
# has fewer tokens than it may have. LEAST_TOKENS keep the device's rate up.
BATCH_S = 0.25
LEAST_TOKENS = 1024
BACKLOG_S = 0.5  # jobs that waited for so long: the device has as much to do as it can


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
        rate: DrainRate,
    ) -> None:
        self.queue, self.slots, self.forward = queue, slots, forward
        self.max_batch_tokens = max_batch_tokens
        self.events, self.metrics, self.rate = events, metrics, rate
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stopping = False
        self.died: Callable[[], None] = lambda: None  # called on the event loop, by a dead thread
        self._ended = 0.0  # time.monotonic() of the last batch's end
        self.busy_since: float | None = None  # time.monotonic() of the batch under way

    @property
    def progress(self) -> tuple[float, int] | None:
        """Differs from before whenever the device got on with its batch. None: it has none."""
        since = self.busy_since
        return (since, self.forward.progress.steps) if since is not None else None

    def _run(self) -> None:
        try:
            while not self.stopping:
                self.step()
        except BaseException:
            log.critical("the engine thread died", exc_info=True)
            self.events.call_soon_threadsafe(self.died)

    def step(self) -> None:
        budget = self._budget()
        taken = self.queue.take(budget, self.slots.hold)
        self._refuse(taken)
        if not taken.jobs:
            return
        self.busy_since = began = time.monotonic()
        try:
            done = self._run_jobs(taken.jobs, taken.slots)
        finally:
            self.slots.let_go(taken.slots.values())
            self.busy_since = None
        jobs, results = [job for job, _ in done], [result for _, result in done]
        tokens = sum(job.tokens for job in jobs)
        now = time.monotonic()
        oldest = min(job.admitted for job in jobs)
        # A small batch of a server with little to do says nothing of what it could do.
        if 2 * tokens >= budget or began - oldest > BACKLOG_S:
            # What lies between two batches counts too, as long as there was work to do.
            self.rate.note(tokens, now - max(self._ended, oldest))
        self._ended = now
        ran = [
            Ran(
                job.adapter.name if job.adapter else BASE,
                job.tokens,
                began - job.admitted,
                job.key,
            )
            for job in jobs
        ]
        self.metrics.batch(ran, now - began)
        self._reply(jobs, results, began)

    def _budget(self) -> int:
        """Tokens of the next batch at most."""
        token_s = self.rate.seconds(1)
        if not token_s:
            return self.max_batch_tokens
        return min(self.max_batch_tokens, max(LEAST_TOKENS, int(BATCH_S / token_s)))

    def _run_jobs(self, jobs: Sequence[Job], slots: Mapping[str, Slot]) -> list[tuple[Job, Result]]:
        """Every job with its result. A batch that fails, or finds no memory, is run in halves, so
        that only the rows at fault err.

        Raises AcceleratorError: after it the device answers nothing until the process ends.
        """
        try:
            batch = form_batch(jobs, slots, self.forward.encoder.device)
            return list(zip(batch.jobs, self.forward.run(batch), strict=True))
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(jobs) == 1:
                log.exception("a row of %d tokens failed", jobs[0].tokens)
                return [(jobs[0], Result(jobs[0].adapter, error=_row_error(error)))]
            log.warning("a batch of %d rows failed, and is run in halves: %r", len(jobs), error)
        half = len(jobs) // 2
        return self._run_jobs(jobs[:half], slots) + self._run_jobs(jobs[half:], slots)

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


def _row_error(error: Exception) -> TrunklineError:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Overloaded("there is no memory for this row now", retry_after_s=1)
    return TrunklineError("the forward of this row failed; the server's log says why")


def _deliver(jobs: Sequence[Job], results: Sequence[Result]) -> None:
    for job, result in zip(jobs, results, strict=True):
        job.reply.put(job.row, result)
