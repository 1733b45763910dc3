"""HalfClose: tells a client that only closed its sending side from one that is gone."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

# Seconds from the client's FIN to the first probe. Answers that come sooner are sent without one.
FIRST_PROBE_S = 0.5
LOOK_S = 0.1  # from a probe to the look for its effect
LONGEST_PAUSE_S = 8.0  # between two probes; the pauses double up to here
PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"


class HalfClose:
    """A FIN alone does not say whether the client still reads: both kinds send the same one.

    So while its answer takes long, the client is sent `100 Continue`, which every HTTP/1.1 client
    passes over (RFC 9110, 15.2). The kernel of a client that is gone answers it with a reset; then
    the connection is aborted, and the work for it is cancelled. `may_probe` says whether an interim
    answer may be written now.
    """

    def __init__(
        self, transport: Any, loop: asyncio.AbstractEventLoop, may_probe: Callable[[], bool]
    ) -> None:
        self._transport, self._loop, self._may_probe = transport, loop, may_probe
        self._timer: asyncio.TimerHandle | None = None
        self.begun = False

    def begin(self) -> None:
        """At the client's FIN; may be called again."""
        if not self.begun:
            self.begun = True
            self._timer = self._loop.call_later(FIRST_PROBE_S, self._probe, FIRST_PROBE_S)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _probe(self, pause_s: float) -> None:
        if not self._may_probe():
            return  # the answer itself is on its way: writing it finds out the same
        self._transport.write(PROBE)
        self._timer = self._loop.call_later(LOOK_S, self._look, pause_s)

    def _look(self, pause_s: float) -> None:
        """No reader is registered after a FIN, so the event loop does not report the reset."""
        connection = self._transport.get_extra_info("socket")
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._transport.abort()
            return
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._timer = self._loop.call_later(pause_s, self._probe, pause_s)
