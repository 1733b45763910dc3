"""HEAD wherever GET is: the same answer without its body."""

from starlette.types import ASGIApp, Receive, Scope, Send

HEADERS_ONLY = "trunkline.headers_only"  # of a scope: whether no byte of the body will be sent


class Heads:
    """Pure ASGI: `app` sees a GET; the connection, which knows the method, sends the headers alone.

    Everything behind it, the guard too, thus treats both alike. An answer whose body is costly to
    make can leave it out where HEADERS_ONLY is set.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET", HEADERS_ONLY: True}
        try:
            await self.app(as_get, receive, send)
        finally:
            scope["route"] = as_get.get("route")  # for the metrics and the log
