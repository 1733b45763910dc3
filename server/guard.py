"""Who may ask for what: keys, scopes and request quotas, before a byte of the body is read."""

import re
from functools import lru_cache

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters.names import BASE
from server.answers import JSONAnswer
from server.errors import RequestError, error_answer
from server.keys import Caller, KeyRing

PUBLIC = {"/", "/health", "/ready", "/docs", "/openapi.json"}
PAGE_FILES = "/static-offline-docs/"  # scripts and styles of /docs: a browser asks without a key
INFER, READ, ADMIN = ({"infer"}, {"infer", "admin"}, {"admin"})
# Method and path -> the scopes of which one is needed; what matches nothing is an admin's.
RULES = [
    (re.compile(r"POST /(encode|critic|classify|tokenize|detokenize|v1/embeddings)"), INFER),
    # The weights are their owner's property.
    (re.compile(r"(GET|HEAD) /adapters/[\s\S]*/file/?"), ADMIN),
    (re.compile(r"POST /((v[12]/)?rerank|similarity|embed|embed_all|predict)?"), INFER),
    (re.compile(r"(GET|HEAD) /v1/models/[\s\S]+"), READ),
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
            if self.keys.configured and not is_public(scope["method"], scope["path"]):
                error = self._refusal(scope)
                if error is not None:
                    await _refuse(error, scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        caller = self.keys.caller_of(scope["headers"])
        if caller is None:
            sentence = "a valid API key is needed, as Authorization: Bearer KEY or x-api-key: KEY"
            return RequestError("unauthorized", sentence)
        if not may_ask(caller, scope["method"], scope["path"]):
            scopes = " or ".join(sorted(needed(scope["method"], scope["path"])))
            return RequestError("forbidden", f"the key does not have the scope for this: {scopes}")
        wait = caller.take_request()
        if wait:
            return RequestError("quota_exceeded", "the key's quota is used up", retry_after_s=wait)
        scope["state"]["caller"] = caller
        return None


def is_public(method: str, path: str) -> bool:
    """Whether it is answered without a key, where keys are configured."""
    return method != "POST" and (path in PUBLIC or path.startswith(PAGE_FILES))


def may_ask(caller: Caller, method: str, path: str) -> bool:
    """Whether the key's scopes allow it."""
    return bool(caller.key.scopes & needed(method, path))


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
    if caller is not None and not may_use(caller, reference):
        raise RequestError("forbidden", "the key may not use this adapter")


def may_use(caller: Caller, reference: str | None) -> bool:
    """Whether the key may use this adapter; base is everybody's."""
    return reference in (None, BASE) or caller.key.may_use(reference.partition("@")[0])


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    answer = error_answer(error, scope["path"], scope["state"].get("request_id"))
    headers = answer.headers
    if error.code == "unauthorized":
        headers["www-authenticate"] = "Bearer"
    if any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]):
        headers["connection"] = "close"  # the body is not read, so nothing can follow it
    await JSONAnswer(answer.body, answer.status, headers)(scope, receive, send)
