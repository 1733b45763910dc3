"""Who may ask for what: keys, scopes and request quotas, before a byte of the body is read."""

import re
from functools import lru_cache

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.answers import JSONAnswer
from server.errors import STATUS, RequestError, error_body, openai_error_body
from server.keys import Caller, KeyRing

PUBLIC = {"/", "/health", "/ready", "/docs", "/openapi.json"}
INFER, READ, ADMIN = ({"infer"}, {"infer", "admin"}, {"admin"})
# Method and path -> the scopes of which one is needed; what matches nothing is an admin's.
RULES = [
    (re.compile(r"POST /(encode|critic|classify|tokenize|detokenize|v1/embeddings)"), INFER),
    (re.compile(r"(GET|HEAD) /(adapters(/[\s\S]*)?|diff|v1/models|info)"), READ),
    (re.compile(r"GET /metrics"), {"metrics", "admin"}),
]


class Guard:
    """Pure ASGI. Without keys it lets everything pass."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.keys.refresh()
            if self.keys.configured and scope["path"] not in PUBLIC:
                error = self._refusal(scope)
                if error is not None:
                    await _refuse(error, scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        secret = _secret(scope)
        caller = self.keys.caller(secret) if secret else None
        if caller is None:
            return RequestError("unauthorized", "a valid API key is needed")
        if not caller.key.scopes & needed(scope["method"], scope["path"]):
            return RequestError("forbidden", "the key's scopes do not allow this")
        wait = caller.take_request()
        if wait:
            return RequestError("quota_exceeded", "the key's quota is used up", retry_after_s=wait)
        scope["state"]["caller"] = caller
        return None


@lru_cache(maxsize=256)
def needed(method: str, path: str) -> set[str]:
    """The scopes of which a key must have one. Unknown paths are an administrator's."""
    asked = f"{method} {path}"
    return next((scopes for rule, scopes in RULES if rule.fullmatch(asked)), ADMIN)


def caller_of(request: Request) -> Caller | None:
    """Whose key the request came with; None on a server without keys."""
    caller: Caller | None = request.scope["state"].get("caller")
    return caller


def check_adapter(request: Request, reference: str | None) -> None:
    """Raises RequestError where the request's key may not use this adapter; base is everybody's."""
    caller = caller_of(request)
    if caller is None or reference in (None, "base"):
        return
    if not caller.key.may_use(reference.partition("@")[0]):
        raise RequestError("forbidden", "the key may not use this adapter")


def _secret(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            bearer: bytes = value[7:].strip()
            return bearer
        if name == b"x-api-key":
            key: bytes = value
            return key
    return None


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"].startswith("/v1/"):
        body = openai_error_body(error)
    else:
        body = error_body(error, scope["state"].get("request_id"))
    headers = {}
    if error.code == "unauthorized":
        headers["www-authenticate"] = "Bearer"
    if "retry_after_s" in error.details:
        headers["retry-after"] = str(error.details["retry_after_s"])
    if any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]):
        headers["connection"] = "close"  # the body is not read, so nothing can follow it
    await JSONAnswer(body, STATUS[error.code], headers)(scope, receive, send)
