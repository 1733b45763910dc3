"""FairWork: long work in threads of its own, shared by API key first."""

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from server.engine.admission import overloaded
from server.engine.errors import Draining
from server.engine.rate import DrainRate
from server.key_lines import KeyLines

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Task:
    """One piece of work that waits for a thread; its future is cancelled if nobody awaits it."""

    work: Callable[[], Any]
    future: asyncio.Future[Any]
    cost: int


class FairWork:
    """Runs work in `threads` threads. Waiting work is dealt over the keys by its cost.

    Every piece of work costs 1 unless its caller says otherwise, so that keys take turns. Work of
    one key runs first in, first out. Of several threads one is kept free of each key, so that no
    key's long work fills them all. A key is an API key's id; "" stands for all anonymous
    requests. The state belongs to the event loop: call every method there.
    """

    def __init__(self, threads: int, name: str, most_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._count, self._free = threads, threads
        self._name, self._most_waiting = name, most_waiting
        self._lines: KeyLines[_Task] = KeyLines()
        self._running: dict[str, int] = {}  # pieces of work that have begun, by key
        self._most_running = max(1, threads - 1)  # of a key
        self.rate = DrainRate()  # of cost
        self._closed = False

    def waiting(self, key: str) -> int:
        """The number of pieces of work of this key that have not begun."""
        return len(self._lines.line(key))

    async def run(self, key: str, work: Callable[[], T], cost: int = 1) -> T:
        """Returns what `work` returns, or raises what it raises; it sees the caller's contextvars.

        Raises Overloaded if the key has `most_waiting` pieces of work waiting already, and
        Draining once it is closed. If the
        awaiting task is cancelled, work that has not begun is dropped; what has begun is awaited
        first, so that nothing that it uses is released under it.
        """
        if self._closed:
            raise _stopping()
        if self.waiting(key) >= self._most_waiting:
            raise self._refusal(key)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = _Task(partial(contextvars.copy_context().run, work), future, cost)
        self._lines.add(key, task)
        self._deal()
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not self._lines.drop(key, task):
                await _ended(future)
            raise

    async def close(self) -> None:
        """Refuse what still waits, at the end of the application, and wait for what runs.

        What runs uses the library, which is closed afterwards.
        """
        self._closed = True
        for task in self._lines.clear():
            if not task.future.done():
                task.future.set_exception(_stopping())
        await asyncio.to_thread(self._pool.shutdown)

    def _refusal(self, key: str) -> Exception:
        """Its Retry-After is one round over the keys: after it, one piece of this key has begun."""
        sentence = f"{self.waiting(key)} requests of this key wait for the {self._name} threads"
        return overloaded(sentence, self.rate.seconds(self._lines.round_cost()))

    def _deal(self) -> None:
        while self._free and (key := self._lines.next(self._may_begin)) is not None:
            self._begin(key, self._lines.pop(key))

    def _may_begin(self, key: str) -> bool:
        return self._running.get(key, 0) < self._most_running

    def _begin(self, key: str, task: _Task) -> None:
        self._free -= 1
        self._running[key] = self._running.get(key, 0) + 1
        running = asyncio.get_running_loop().run_in_executor(self._pool, task.work)
        running.add_done_callback(partial(self._done, key, task, time.monotonic()))

    def _done(self, key: str, task: _Task, began: float, running: asyncio.Future[Any]) -> None:
        self._free += 1
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self.rate.note(task.cost, (time.monotonic() - began) / self._count)
        _pass_on(running, task.future)
        self._deal()


def _stopping() -> Draining:
    return Draining("the server is stopping", retry_after_s=5)


async def _ended(future: asyncio.Future[Any]) -> None:
    """Wait for it, whatever cancels the waiting task meanwhile; its error is the caller's."""
    while not future.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({future})
    if not future.cancelled():
        future.exception()  # so that nothing reports it as never retrieved


def _pass_on(source: asyncio.Future[Any], target: asyncio.Future[Any]) -> None:
    """The result or the error of `source`, unless nobody awaits `target` any more."""
    if source.cancelled():
        target.cancel()
        return
    error = source.exception()
    if target.done():
        return
    if error is not None:
        target.set_exception(error)
    else:
        target.set_result(source.result())
