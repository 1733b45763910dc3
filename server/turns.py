"""Turns: large bodies are read and parsed a few at a time, and refused when too many wait."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.engine.admission import overloaded
from server.engine.rate import DrainRate

AT_ONCE = 4  # one is parsed, the next are read meanwhile
LONGEST_S = 1.0  # who takes longer to send has no more turn, and slows nobody down either


class Turns:
    """Who has no turn leaves its body unread, in the kernel's buffers and at its client's.

    The parser holds Python's lock for milliseconds, and behind it wait every piece that is read of
    another body, every other request and every new connection. So few are read beside it, and who
    would wait for too long is told so before a byte is read.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._free = asyncio.Semaphore(AT_ONCE)
        self._bytes = 0  # of those that have a turn or wait for one
        self._rate = DrainRate()  # of bytes

    @asynccontextmanager
    async def take(self, size: int, key: str = "") -> AsyncIterator[None]:
        """Wait for a turn with a body of so many bytes. Raises Overloaded instead of long waits."""
        wait_s = self._rate.seconds(self._bytes)
        if wait_s > self._most_s:
            sentence = f"a body would wait for {wait_s:.1f} s, and may for {self._most_s:.1f} s"
            raise overloaded(sentence, wait_s - self._most_s)
        self._bytes += size
        try:
            async with self._turn():
                yield
        finally:
            self._bytes -= size

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        await self._free.acquire()
        ended = False

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                self._free.release()

        timer = asyncio.get_running_loop().call_later(LONGEST_S, end)
        try:
            yield
        finally:
            timer.cancel()
            end()

    def note(self, size: int, began: float) -> None:
        """A body of so many bytes was parsed, which began then (time.monotonic())."""
        self._rate.note(size, time.monotonic() - began)
