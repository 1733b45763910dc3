"""CORS: which pages of other origins may read the answers (the Fetch standard, 3.2)."""

import re
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Headers = list[tuple[bytes, bytes]]

METHODS = b"GET, HEAD, POST, PUT, DELETE"
EXPOSED = (
    b"x-request-id, x-trunkline-metadata, x-trunkline-adapter, etag, location, retry-after, "
    b"content-digest, repr-digest, content-disposition, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
PREFLIGHT_S = b"600"  # that a browser may remember a preflight's answer
_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+(\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")


class Cors:
    """The headers for these origins; `*` is every origin.

    An API key in a header is no credential in the sense of the standard, so credentials (cookies)
    are never allowed.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._all = "*" in origins
        self._origins = {origin.encode("ascii") for origin in origins}

    def headers(self, request: Iterable[tuple[bytes, bytes]]) -> Headers:
        """What an answer to a request with these headers gets, a refusal too."""
        if not self._origins:
            return []
        origin = next((value for name, value in request if name == b"origin"), None)
        allowed = self._allowed(origin)
        if allowed is None:
            return [] if self._all else [(b"vary", b"origin")]
        named = [(b"access-control-allow-origin", allowed)]
        named.append((b"access-control-expose-headers", EXPOSED))
        return named if self._all else [*named, (b"vary", b"origin")]

    def preflight(self, scope: Scope) -> Headers | None:
        """The headers of the answer to a preflight; None for any other request."""
        if scope["method"] != "OPTIONS" or not self._origins:
            return None
        asked = dict(scope["headers"])
        if b"origin" not in asked or b"access-control-request-method" not in asked:
            return None
        answer = self.headers(scope["headers"])
        if self._allowed(asked[b"origin"]) is None:
            return answer
        answer += [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-max-age", PREFLIGHT_S),
        ]
        wanted = asked.get(b"access-control-request-headers", b"")
        if _NAMES.fullmatch(wanted):  # `*` would not allow Authorization
            answer.append((b"access-control-allow-headers", wanted))
        return answer

    def _allowed(self, origin: bytes | None) -> bytes | None:
        if origin is None:
            return None
        if self._all:
            return b"*"
        return origin if origin in self._origins else None


class CorsHeaders:
    """Pure ASGI, before the guard: a browser sends its preflights without a key."""

    def __init__(self, app: ASGIApp, cors: Cors) -> None:
        self.app, self.cors = app, cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        preflight = self.cors.preflight(scope)
        if preflight is not None:
            await send({"type": "http.response.start", "status": 204, "headers": preflight})
            await send({"type": "http.response.body", "body": b""})
            return
        more = self.cors.headers(scope["headers"])

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        await self.app(scope, receive, send_with_headers if more else send)
