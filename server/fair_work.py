"""FairWork: long work in threads of its own, shared by API key first."""

import asyncio
import contextvars
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from server.engine.admission import overloaded
from server.engine.errors import Draining
from server.engine.rate import DrainRate

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Task:
    """One piece of work that waits for a thread; its future is cancelled if nobody awaits it."""

    work: Callable[[], Any]
    future: asyncio.Future[Any]


class FairWork:
    """Runs work in `threads` threads. Waiting work is dealt round robin over the keys.

    Work of one key runs first in, first out. A key is an API key's id; "" stands for all anonymous
    requests. The state belongs to the event loop: call every method there.
    """

    def __init__(self, threads: int, name: str, most_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._count, self._free = threads, threads
        self._name, self._most_waiting = name, most_waiting
        self._waiting: OrderedDict[str, deque[_Task]] = OrderedDict()  # by key, next key first
        self._rate = DrainRate()  # of pieces of work

    def waiting(self, key: str) -> int:
        """The number of pieces of work of this key that have not begun."""
        return len(self._waiting.get(key, ()))

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """Returns what `work` returns, or raises what it raises; it sees the caller's contextvars.

        Raises Overloaded if the key has `most_waiting` pieces of work waiting already. If the
        awaiting task is cancelled, work that has not begun is dropped.
        """
        if self.waiting(key) >= self._most_waiting:
            raise self._refusal(key)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = _Task(partial(contextvars.copy_context().run, work), future)
        self._waiting.setdefault(key, deque()).append(task)
        self._deal()
        try:
            return await future
        except asyncio.CancelledError:
            self._drop(key, task)
            raise

    def close(self) -> None:
        """Refuse what still waits, at the end of the application; what runs is left to end."""
        for line in self._waiting.values():
            for task in line:
                if not task.future.done():
                    task.future.set_exception(Draining("the server is stopping", retry_after_s=5))
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _refusal(self, key: str) -> Exception:
        """Its Retry-After is one round over the keys: after it, one piece of this key has begun."""
        sentence = f"{self.waiting(key)} requests of this key wait for the {self._name} threads"
        return overloaded(sentence, self._rate.seconds(len(self._waiting)))

    def _deal(self) -> None:
        while self._free and self._waiting:
            key, line = self._waiting.popitem(last=False)
            task = line.popleft()
            if line:
                self._waiting[key] = line  # after all other keys
            self._begin(task)

    def _begin(self, task: _Task) -> None:
        self._free -= 1
        running = asyncio.get_running_loop().run_in_executor(self._pool, task.work)
        running.add_done_callback(partial(self._done, task, time.monotonic()))

    def _done(self, task: _Task, began: float, running: asyncio.Future[Any]) -> None:
        self._free += 1
        self._rate.note(1, (time.monotonic() - began) / self._count)
        _pass_on(running, task.future)
        self._deal()

    def _drop(self, key: str, task: _Task) -> None:
        line = self._waiting.get(key)
        if line is None or task not in line:  # it has begun
            return
        line.remove(task)
        if not line:
            del self._waiting[key]


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
