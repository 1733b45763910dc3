"""LargeAnswer: a body in pieces, sent no faster than its client reads."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.answer_memory import held_by
from server.connection import CLIENT, Client

PART_BYTES = 256 << 10  # of one write
REST_S = 50e-6  # from one piece to the next: other threads get the GIL
WORK_S = 4e-3  # of pieces without a rest
GRACE_S, LEAST_BYTES_PER_S = 60, 64 << 10  # a client has GRACE_S, and its body's bytes by the rate


class LargeAnswer(Response):
    """Its memory is given back part by part, as the parts are written.

    A client that reads more slowly than LEAST_BYTES_PER_S on the whole is cut off: what it does
    not read is held against the answers of its key.
    """

    def __init__(
        self,
        pieces: Iterable[bytes],
        media_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Takes all pieces, in the thread of the caller, which is to be no event loop's."""
        super().__init__(None, headers=headers, media_type=media_type)
        self._parts = _joined(pieces)
        self._bytes = sum(map(len, self._parts))
        self.headers["content-length"] = str(self._bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held = held_by(scope)
        held.shrink(self._bytes)
        late = asyncio.get_running_loop().call_later(self.seconds, _cut_off, scope)
        try:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            while self._parts:
                part = self._parts.popleft()
                more = bool(self._parts)
                await send({"type": "http.response.body", "body": part, "more_body": more})
                self._bytes -= len(part)
                held.shrink(self._bytes)
        finally:
            late.cancel()

    @property
    def seconds(self) -> float:
        """How long the client may take for it."""
        return GRACE_S + self._bytes / LEAST_BYTES_PER_S


def _cut_off(scope: Scope) -> None:
    client: Client | None = scope.get(CLIENT)
    if client is not None and client.cycle is not None:
        client.cycle.transport.abort()


def _joined(pieces: Iterable[bytes]) -> deque[bytes]:
    """The pieces in parts of about PART_BYTES. The thread rests in between."""
    parts: deque[bytes] = deque()
    held: list[bytes] = []
    size, worked = 0, time.monotonic()
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= PART_BYTES:
            parts.append(b"".join(held))
            held, size = [], 0
        if time.monotonic() - worked > WORK_S:
            time.sleep(REST_S)
            worked = time.monotonic()
    parts.append(b"".join(held))
    return parts
