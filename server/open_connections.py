"""OpenConnections: bounds the connections of the process, shared by API key first."""

import ipaddress
from collections.abc import Iterable
from typing import Any, Protocol

from server.keys import KeyRing


class Closable(Protocol):
    transport: Any


class OpenConnections:
    """At most `most` connections are open. Used on the event loop alone.

    A connection is idle while no request is being read or answered on it. It is held by the API
    key of its last request, by its client's address before that. Where a new connection is one too
    many, an idle one is closed: of the holder with the most, the one that is idle for longest.
    A holder has requests on fewer connections than are without any: on half of them if it is alone,
    on a third if there are two (dynamic thresholds, Choudhury and Hahne 1998). So there are always
    idle ones, for a new client too.
    """

    def __init__(self, most: int, keys: KeyRing) -> None:
        self.most, self._keys = most, keys
        self.open = 0
        self._holders: dict[Closable, str] = {}
        self._idle: dict[str, dict[Closable, None]] = {}  # by holder, idle for the longest first
        self._busy: dict[str, int] = {}  # by holder
        self.busy = 0

    def enter(self, connection: Closable) -> bool:
        """Count a new connection; False where no idle one can make room for it.

        It is counted all the same, until it has left.
        """
        self.open += 1
        if self.open > self.most and not self._make_room():
            return False
        self._rest(connection, _address(connection))
        return True

    def leave(self, connection: Closable) -> None:
        self.open -= 1
        holder = self._holders.pop(connection, None)
        if holder is not None and not self._stir(connection, holder):
            self._end(holder)

    def begin(self, connection: Closable, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """A request begins on an idle connection; False where its key has its share of requests."""
        before = self._holders.get(connection)
        if before is None:  # it is being closed
            return True
        caller = self._keys.caller_of(headers)
        holder = f"key {caller.key.id}" if caller is not None else _address(connection)
        own = self._busy.get(holder, 0)
        if own >= self.most - self.busy:
            return False
        self._stir(connection, before)
        self._holders[connection] = holder
        self._busy[holder] = own + 1
        self.busy += 1
        return True

    def end(self, connection: Closable) -> None:
        """The last of its requests was answered."""
        holder = self._holders.get(connection)
        if holder is not None and connection not in self._idle.get(holder, ()):
            self._end(holder)
            self._rest(connection, holder)

    def _rest(self, connection: Closable, holder: str) -> None:
        self._holders[connection] = holder
        self._idle.setdefault(holder, {})[connection] = None

    def _stir(self, connection: Closable, holder: str) -> bool:
        """Whether it was idle; it is no longer."""
        idle = self._idle.get(holder, {})
        if connection not in idle:
            return False
        del idle[connection]
        if not idle:
            del self._idle[holder]
        return True

    def _end(self, holder: str) -> None:
        self.busy -= 1
        self._busy[holder] -= 1
        if not self._busy[holder]:
            del self._busy[holder]

    def _make_room(self) -> bool:
        if not self._idle:
            return False
        idle = self._idle
        holder = max(idle, key=lambda each: len(idle[each]) + self._busy.get(each, 0))
        connection = next(iter(idle[holder]))
        self._stir(connection, holder)
        del self._holders[connection]
        connection.transport.abort()  # what a slow client has not read of its answer goes too
        return True


def _address(connection: Closable) -> str:
    """Where it comes from. One client may have all addresses of an IPv6 network of 64 bits."""
    peer = connection.transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return "unix"
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return str(peer[0])
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
