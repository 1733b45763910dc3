"""X-Forwarded-*: who the client is, and how it reached the proxy, as trusted proxies say it."""

import ipaddress
import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

UNIX = "unix"  # in a list of trusted proxies: every client of the unix socket
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")


class Proxies:
    """Pure ASGI: sets the scope's client, scheme and host header from a trusted proxy's headers.

    All others' are ignored: with such headers a client could choose its name in the audit.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[str]) -> None:
        self.app = app
        self._unix = UNIX in trusted
        self._networks = [
            ipaddress.ip_network(name.strip("[]"), strict=False) for name in trusted if name != UNIX
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_proxy(scope["client"]):
            self._apply(scope)
        await self.app(scope, receive, send)

    def _is_proxy(self, client: tuple[str, int] | None) -> bool:
        """A client without an address came through the unix socket."""
        if client is None or not client[0]:
            return self._unix
        return self._trusts(client[0])

    def _trusts(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        mapped = getattr(parsed, "ipv4_mapped", None)  # of a socket that serves both families
        return any((mapped or parsed) in network for network in self._networks)

    def _apply(self, scope: Scope) -> None:
        client = self._client_of(_values(scope, b"x-forwarded-for"))
        if client is not None:
            scope["client"] = (client, 0)
        scheme = next(iter(_values(scope, b"x-forwarded-proto")), "").lower()
        if scheme in ("http", "https"):
            scope["scheme"] = scheme
        host = next(iter(_values(scope, b"x-forwarded-host")), "")
        if _HOST.fullmatch(host):
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope["headers"] = [(b"host", host.encode("ascii")), *others]

    def _client_of(self, hops: Sequence[str]) -> str | None:
        """The last hop that is no trusted proxy: what stands before it, a client may have made up.

        None where there is none, or where it is no address.
        """
        client = None
        for hop in reversed(hops):
            address = _address(hop)
            if address is None:
                break
            client = address
            if not self._trusts(address):
                break
        return client


def _values(scope: Scope, name: bytes) -> list[str]:
    """The comma-separated values of a header, and of further ones of its name."""
    lines = [value.decode("latin-1") for key, value in scope["headers"] if key == name]
    return [part.strip() for line in lines for part in line.split(",") if part.strip()]


def _address(hop: str) -> str | None:
    """The address of 1.2.3.4, 1.2.3.4:5, ::1, [::1] or [::1]:5."""
    match = re.fullmatch(r"\[([^\]]*)\](?::\d+)?|([^:]*)(?::\d+)?|(.*)", hop)
    text = next((group for group in match.groups() if group is not None), "") if match else ""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None
