"""BodyMemory: large bodies are received within a bound of memory that is shared by key first."""

import asyncio
import time
from collections.abc import Callable

RECHECK_S = 0.5
# A body of which nothing arrived for so long gives up its place if others of its key need room.
STALLED_S = 2.0
PIECE = 320 << 10  # the most that one receive() brings: server/connection.py reads 256 KiB at once


class LargeBody:
    """One large body on its way: what it holds of the memory, and whether it has to wait."""

    def __init__(
        self, memory: "BodyMemory", key: str, declared: int, cut: Callable[[], object]
    ) -> None:
        self.memory, self.key, self.declared = memory, key, declared
        self.cut = cut  # ends its reading; called at most once
        self.received = 0  # bytes
        self.expected = 0  # bytes, counted before they arrive: of a body that has waited for room
        self.last = time.monotonic()  # when it last could receive, or did
        self.stalled = False

    @property
    def held(self) -> int:
        return self.received + self.expected


class BodyMemory:
    """Counts the received bytes of large bodies until they are parsed.

    A key's bodies are read while they hold less than what is free of `limit`: one key alone gets
    half of it, two keys a third each, and there is always room for another key (dynamic thresholds,
    Choudhury and Hahne 1998). Beyond that a body is not read: its bytes stay at its client. One
    body of every key is always read to its end, so that keys with small shares come to theirs too;
    all bodies together hold at most `limit` and one body a key.

    A head without a body holds nothing, and a body that stalls gives up its place.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: dict[str, int] = {}
        self._reading: dict[LargeBody, None] = {}  # in order of arrival
        self._paused: dict[LargeBody, asyncio.Event] = {}  # those that wait for room
        self._whole: dict[LargeBody, None] = {}  # received, and not parsed yet

    @property
    def held(self) -> int:
        return sum(self._held.values())

    def enter(self, body: LargeBody) -> None:
        self._reading[body] = None

    async def room(self, body: LargeBody) -> None:
        """Wait until the body may receive its next piece."""
        if self._may_read(body) and not self._is_behind(body):
            return
        may_go_on = self._paused[body] = asyncio.Event()
        try:
            while not may_go_on.is_set():
                self._cut_stalled(body.key)
                await _wait(may_go_on, RECHECK_S)
                self._wake()
        finally:
            del self._paused[body]
            body.last = time.monotonic()

    def received(self, body: LargeBody, size: int) -> None:
        self._count(body, size - body.expected)
        body.received, body.expected = body.received + size, 0
        body.last = time.monotonic()

    def whole(self, body: LargeBody) -> None:
        """All of it is here: it waits for the parser now."""
        del self._reading[body]
        self._whole[body] = None

    def leave(self, body: LargeBody) -> None:
        """It was parsed, or given up."""
        self._reading.pop(body, None)
        self._whole.pop(body, None)
        self._count(body, -body.held)
        self._wake()

    def paused_bytes(self) -> dict[str, int]:
        """By key, what the bodies that wait for room have yet to send."""
        sums: dict[str, int] = {}
        for body in self._paused:
            left = max(body.declared - body.received, PIECE)
            sums[body.key] = sums.get(body.key, 0) + left
        return sums

    def _count(self, body: LargeBody, size: int) -> None:
        self._held[body.key] = self._held.get(body.key, 0) + size
        if not self._held[body.key]:
            del self._held[body.key]

    def _may_read(self, body: LargeBody) -> bool:
        if self._held.get(body.key, 0) < self.limit - self.held:
            return True
        return body is self._first(body.key)

    def _first(self, key: str) -> LargeBody | None:
        """The body of a key that is read whatever the others hold; None while one is parsed."""
        if any(body.key == key for body in self._whole):
            return None
        own = [body for body in self._reading if body.key == key]
        return next((body for body in own if body.received), own[0] if own else None)

    def _is_behind(self, body: LargeBody) -> bool:
        """Whether another body of the key waits for room already, and so comes before this one."""
        waits = any(other.key == body.key for other in self._paused)
        return waits and body is not self._first(body.key)

    def _wake(self) -> None:
        for body, may_go_on in self._paused.items():
            if not may_go_on.is_set() and self._may_read(body):
                may_go_on.set()
                body.expected = PIECE
                self._count(body, PIECE)

    def _cut_stalled(self, key: str) -> None:
        late = time.monotonic() - STALLED_S
        for body in self._reading:
            stalls = body not in self._paused and body.last < late and body.held
            if body.key == key and stalls and not body.stalled:
                body.stalled = True
                body.cut()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
