"""Corked: a transport that sends an answer's head and its body in one write."""

import asyncio
from typing import Any

from server.write_timeout import WriteTimeout


class Corked:
    """What of a transport uvicorn uses.

    uvicorn writes a head alone, and each write is a system call, and a read of its client's. So a
    turn's first write waits for the second; alone, it is sent when the turn of the loop ends.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: bytes | None = None
        self._ending = False  # whether `_end_turn` is to come
        self.writes = WriteTimeout(transport, loop)
        self.get_extra_info = transport.get_extra_info
        self.is_closing, self.abort = transport.is_closing, transport.abort
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading

    def write(self, data: bytes) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._transport.writelines((held, data))
            self.writes.wrote(len(held) + len(data))
            return
        self._held = data
        if not self._ending:
            self._ending = True
            self._loop.call_soon(self._end_turn)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _end_turn(self) -> None:
        self._ending = False
        self._flush()

    def _flush(self) -> None:
        held, self._held = self._held, None
        if held is not None and not self._transport.is_closing():
            self._transport.write(held)
            self.writes.wrote(len(held))
