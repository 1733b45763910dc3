"""A balancer as small as one can be: what its clients ask goes to the backends that are /ready."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from itertools import count

HOST = "127.0.0.1"
POLL_S = 0.5  # longer than a server without a drain window takes to stop
READY = b"GET /ready HTTP/1.1\r\nhost: backend\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Balancer:
    """Sends each request to one of the backends, by their ports, that were ready at the last poll.

    A request has a connection of its own to its backend: one kept open could be closed by the
    backend, idle, at the moment of its next use. Nothing is tried twice, not even a connect: what
    goes wrong at a backend reaches the client.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self.polled = dict.fromkeys(ports, b"")  # the last answer of /ready, or why there is none
        self.answers: Counter[int] = Counter()  # by the backend's port
        self._turns = count()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Polls and serves in the block, under the URL that it gives."""
        server = await asyncio.start_server(self._serve_client, HOST, 0)
        polls = [asyncio.create_task(self._poll(port)) for port in self.polled]
        try:
            yield f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
        finally:
            for poll in polls:
                poll.cancel()
            server.close()
            await server.wait_closed()

    @property
    def ready(self) -> list[int]:
        return [port for port, said in self.polled.items() if said.startswith(b"HTTP/1.1 200 ")]

    async def _poll(self, port: int) -> None:
        """A backend that is slow to answer stays what it was: slow is not down."""
        while True:
            try:
                self.polled[port] = await exchange(port, READY)
            except (OSError, EOFError) as error:
                self.polled[port] = repr(error).encode()
            await asyncio.sleep(POLL_S)

    async def _serve_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with closing(writer), suppress(OSError, EOFError):  # of a client that left
            while request := await read_message(reader):
                writer.write(await self._answer(request))
                await writer.drain()

    async def _answer(self, request: bytes) -> bytes:
        """The backend's; 502 if it refused or broke the connection, 503 if none is ready."""
        ready = self.ready
        if not ready:
            return refusal("503 Service Unavailable", f"none is ready: {self.polled}")
        port = ready[next(self._turns) % len(ready)]
        try:
            answer = await exchange(port, request)
        except (OSError, EOFError) as error:
            return refusal("502 Bad Gateway", f"backend {port}: {error!r}")
        self.answers[port] += 1
        return answer


async def exchange(port: int, request: bytes) -> bytes:
    """The whole answer, over a connection of its own. Raises OSError, EOFError."""
    reader, writer = await asyncio.open_connection(HOST, port)
    with closing(writer):
        writer.write(request)
        answer = await read_message(reader)
    if not answer:
        raise EOFError("closed without an answer")
    return answer


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """A request or an answer, head and body; nothing where the connection ends before one.

    Raises EOFError where it ends within one.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return b""
    length = _LENGTH.search(head)
    return head + await reader.readexactly(int(length[1]) if length else 0)


def refusal(status: str, reason: str) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(reason)}\r\n\r\n{reason}".encode()
