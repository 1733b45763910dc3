"""WriteTimeout: closes a connection whose client does not read its answer."""

import asyncio
from typing import Any

WRITE_TIMEOUT_S = 60.0  # without a byte taken from the write buffer; longer than any reader pauses


class WriteTimeout:
    """Aborts the transport once its write buffer has not shrunk for `seconds`.

    Without it a client that never reads would hold its answer in memory for ever.
    """

    seconds = WRITE_TIMEOUT_S

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._timer is None:
            self._wait(self._transport.get_write_buffer_size())

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, size: int) -> None:
        self._timer = self._loop.call_later(self.seconds, self._look, size)

    def _look(self, before: int) -> None:
        size = self._transport.get_write_buffer_size()
        if size and size >= before:
            self._transport.abort()
        else:
            self._wait(size)
