"""Pure ASGI: a request id for every answer, its metrics and its log line."""

import logging
import re
import secrets
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.connection import CLIENT, Client
from server.errors import CODE
from server.logs import FACTS, REQUEST_ID
from server.metrics import Metrics

log = logging.getLogger("trunkline.access")

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestContext:
    """Takes x-request-id from the request, if sane, or makes one; the answer carries it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, draining: Callable[[], bool]) -> None:
        self.app, self.metrics, self.draining = app, metrics, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        request_id = request_id_of(scope)
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id.decode(), "received": began, FACTS: dict}
        REQUEST_ID.set(state["request_id"])
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
                # The rest of a late body may never come; a kept connection would end, maybe under
                # its next request, with the drain window.
                unread = status == HTTPStatus.SERVICE_UNAVAILABLE and _has_unread_body(scope)
                if status == HTTPStatus.REQUEST_TIMEOUT or unread or self.draining():
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            note_answer(self.metrics, scope, route, status, began, state[FACTS])


def note_answer(
    metrics: Metrics,
    scope: Scope,
    route: str,
    status: int,
    began: float,
    more: Callable[[], dict[str, Any]] = dict,
) -> None:
    """The metrics and the log line of an answer to what came then (time.monotonic())."""
    seconds = time.monotonic() - began
    state = scope.get("state", {})
    caller = state.get("caller")
    metrics.request(route, status, seconds, state.get(CODE, ""), caller.key.id if caller else "")
    if log.isEnabledFor(logging.INFO):
        path = quote(scope["path"])  # no line end of a client's gets into the log
        facts = {"method": scope["method"], "path": path, "route": route, "status": status}
        facts |= {"total_ms": round(seconds * 1e3, 3)} | more()
        values = (scope["method"], path, status, seconds * 1e3)
        log.info("%s %s %d %.1f ms", *values, extra={FACTS: facts})


def request_id_of(scope: Scope) -> bytes:
    """The client's x-request-id, if sane; else one that is made."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            sane: bytes = value
            return sane
    return secrets.token_hex(16).encode()


def _has_unread_body(scope: Scope) -> bool:
    """Whether more of the request is to come: its client may send it for ever."""
    client: Client | None = scope.get(CLIENT)
    return client is not None and not client.sent_all
