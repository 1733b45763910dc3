"""Engine: the one small async interface to the device, which front ends stand before."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from adapters.library import Library
from model.checkpoint import Backbone
from server.engine.admission import Admission, Row
from server.engine.errors import NotReady
from server.engine.forward import Forward
from server.engine.job import Ask, Reply, Result
from server.engine.loop import EngineLoop
from server.engine.permits import TokenPermits
from server.engine.queue import JobQueue
from server.engine.rate import DrainRate
from server.metrics import Metrics

# A batch on the device in which no layer ends in ticks of so long: not ready. Within 2 s of the
# last layer's end: a tick may pass before the first that counts, and one is left for late ticks.
STUCK_AFTER_S = 1.5
LOST_AFTER_S = 60.0  # for so long: lost, and with it the process
TICK_S = 0.25

log = logging.getLogger("trunkline.engine")


class Engine:
    """A resident trunk and its queue. Made on the event loop that awaits it."""

    def __init__(
        self,
        backbone: Backbone,
        library: Library,
        forward: Forward,
        metrics: Metrics,
        *,
        max_batch_tokens: int,
        max_queue_tokens: int,
        max_request_tokens: int,
        max_queue_s: float,
        fair_shares: Mapping[str, float],
    ) -> None:
        permits = TokenPermits(max_queue_tokens)
        metrics.waiting_tokens.set_function(lambda: permits.held)
        self.queue, self.rate = JobQueue(fair_shares), DrainRate()
        self.admission = Admission(
            library, backbone, permits, self.queue, self.rate, max_request_tokens, max_queue_s
        )
        events = asyncio.get_running_loop()
        library.slots.changed = self.queue.loaded
        library.slots.loaded = metrics.load_seconds.observe
        self.loop = EngineLoop(
            self.queue, library.slots, forward, max_batch_tokens, events, metrics, self.rate
        )
        self.loop.died = self._fail
        self.metrics = metrics
        self.failed = False
        self.lost: Callable[[], None] = lambda: None  # the server's: ends the process
        self._waiting: set[Reply] = set()
        self._waking = False
        self._stuck_s = 0.0
        self._watch: asyncio.Task[None] | None = None

    async def encode(
        self, rows: Sequence[Row], ask: Ask, deadline: float, key: str = ""
    ) -> list[Result]:
        """A Result a row, in order. `deadline` is of time.monotonic(), `key` an API key's id.

        Raises a TrunklineError where the request is not admitted or its deadline is over; a
        Result may carry an error of its own. If the caller is cancelled, rows not yet begun are
        dropped.
        """
        if self.failed or not self.alive:
            raise NotReady("the engine is not running")
        jobs, reply = self.admission.admit(rows, ask, deadline, key)
        self._waiting.add(reply)
        self.queue.put(jobs)
        self._wake_soon()
        left = deadline - time.monotonic()
        timer = asyncio.get_running_loop().call_later(left, reply.expire)
        try:
            return await reply.future
        finally:
            timer.cancel()
            self._waiting.discard(reply)
            reply.abandoned = True

    def _wake_soon(self) -> None:
        """Wake the device thread when this turn of the event loop has admitted all that it will.

        Woken by the first of them it would take a batch of one, and the two threads would hand
        Python's lock to each other over it.
        """
        if not self._waking:
            self._waking = True
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._waking = False
        self.queue.wake()

    @property
    def alive(self) -> bool:
        return self.loop.thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether the device thread lives, and its batch gets on; no longer within 2 s."""
        return self.alive and not self.failed and self._stuck_s < STUCK_AFTER_S

    def start(self) -> None:
        self.loop.thread.start()
        self._watch = asyncio.get_running_loop().create_task(self._watch_batches())

    async def _watch_batches(self) -> None:
        """Counts ticks, not the clock: a process that was stopped and goes on is not stuck.

        A long batch on a slow machine is not stuck either, as long as layers of it end.
        """
        last = self.loop.progress
        while not self.failed:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.metrics.lag_seconds.observe(max(0.0, time.monotonic() - due))
            now = self.loop.progress
            self._stuck_s = self._stuck_s + TICK_S if now is not None and now == last else 0.0
            last = now
            if self._stuck_s >= LOST_AFTER_S:
                log.critical("the batch on the device has not got on for %g s", self._stuck_s)
                self._fail()

    def _fail(self) -> None:
        """The device thread is gone for good: whoever waits is told, and the process is to end."""
        self.failed = True
        self._fail_waiting("the engine has failed, and the server restarts; try again")
        self.lost()

    def _fail_waiting(self, sentence: str) -> None:
        for reply in self._waiting:
            reply.refuse(NotReady(sentence, retry_after_s=5))

    async def stop(self) -> None:
        """Let the batch under way finish, then end the thread; what still waits is told."""
        if self._watch is not None:
            self._watch.cancel()
        self.loop.stopping = True
        self.queue.close()
        if not self.failed:
            await asyncio.to_thread(self.loop.thread.join)
        self._fail_waiting("the server has stopped")
