"""WriteTimeout: closes a connection whose client does not read its answer, or hardly reads it."""

import asyncio
from typing import Any

WRITE_TIMEOUT_S = 60.0  # from one look at the write buffer to the next; longer than a reader pauses
LEAST_BYTES = 64 << 10  # that a client takes in that time, where it does not take all


class WriteTimeout:
    """Aborts a transport from which nearly nothing was taken for `seconds`.

    Without it a client that never reads would hold its answer in memory, and its connection, for
    ever. It watches as long as the transport holds bytes, few or many, of a closing one too.
    """

    seconds = WRITE_TIMEOUT_S

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._timer: asyncio.TimerHandle | None = None
        self._written = 0  # bytes in all

    def wrote(self, size: int) -> None:
        """Called behind each write of so many bytes."""
        self._written += size
        if self._timer is None and self._transport.get_write_buffer_size():
            self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        taken = self._written - self._transport.get_write_buffer_size()
        due = min(self._written, taken + LEAST_BYTES)
        self._timer = self._loop.call_later(self.seconds, self._look, due)

    def _look(self, due: int) -> None:
        """`due` is how many bytes are to be taken by now, of all that were ever written."""
        self._timer = None
        held = self._transport.get_write_buffer_size()
        if held and self._written - held < due:
            self._transport.abort()
        elif held:
            self._wait()
