"""Turns: large bodies are received within a bound of memory and parsed one after the other.

Both the memory and the parser's time are shared by key first.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from server.body_memory import BodyMemory, LargeBody
from server.engine.admission import overloaded
from server.errors import RequestError
from server.fair_work import FairWork

T = TypeVar("T")

BODIES = 8  # the memory holds so many of the largest bodies, beside one a key
MOST_WAITING = 1000  # bodies of a key: more than the memory holds


class Turns:
    """The JSON parser holds the GIL, so one thread parses, and keys are served by their bytes.

    A body counts from the bytes that were received: one that has sent its head alone takes nothing
    from others. A key whose own bodies would wait for too long is refused with 503 before more of
    them are read.
    """

    def __init__(self, most_s: float, max_body_bytes: int) -> None:
        self._most_s = most_s
        self._parser = FairWork(1, "parser", MOST_WAITING)
        self.memory = BodyMemory(BODIES * max_body_bytes)
        self._parsing: dict[str, int] = {}  # bytes by key

    @asynccontextmanager
    async def take(self, declared: int, key: str) -> AsyncIterator[LargeBody]:
        """A place for one large body. Raises Overloaded if it would wait for too long."""
        self._refuse_long_waits(key)
        task = asyncio.current_task()
        assert task is not None
        body = LargeBody(self.memory, key, declared, task.cancel)
        self.memory.enter(body)
        try:
            yield body
        except asyncio.CancelledError:
            if body.stalled and task.uncancel() == 0:
                raise RequestError(
                    "receive_timeout", "the body stalled while others came"
                ) from None
            raise
        finally:
            self.memory.leave(body)

    async def parse(self, body: LargeBody, work: Callable[[], T]) -> T:
        """What `work` returns, in the parser's thread, once it is the body's turn."""
        self.memory.whole(body)
        with self._counted(body):
            return await self._parser.run(body.key, work, body.received)

    async def close(self) -> None:
        """At the end of the application."""
        await self._parser.close()

    def _refuse_long_waits(self, key: str) -> None:
        """Until a key's own bytes are parsed, each other key is served as many at most."""
        waiting = self.memory.paused_bytes()
        for each, size in self._parsing.items():
            waiting[each] = waiting.get(each, 0) + size
        own = waiting.get(key, 0)
        wait_s = self._parser.rate.seconds(sum(min(own, size) for size in waiting.values()))
        if wait_s > self._most_s:
            sentence = f"a body would wait for {wait_s:.1f} s, and may for {self._most_s:.1f} s"
            raise overloaded(sentence, wait_s - self._most_s)

    @contextmanager
    def _counted(self, body: LargeBody) -> Iterator[None]:
        self._parsing[body.key] = self._parsing.get(body.key, 0) + body.received
        try:
            yield
        finally:
            self._parsing[body.key] -= body.received
            if not self._parsing[body.key]:
                del self._parsing[body.key]
