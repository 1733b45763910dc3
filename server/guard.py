"""Who may ask for what: keys, scopes and request quotas, before a byte of the body is read."""

import re
from functools import lru_cache
from typing import NamedTuple

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters.errors import BadName
from adapters.names import BASE, check_name
from server.answers import JSONAnswer
from server.errors import CODE, RequestError, error_answer, no_route, wrong_method
from server.keys import Caller, KeyRing, QuotaWait
from server.rate_headers import with_rate_headers

MAX_NAME = 100  # characters of a key's name in an error

# Read with GET (or HEAD, which is a GET here: server/heads.py) by everybody. The last is the page
# of /docs, which asks no other host for its scripts.
PUBLIC = {"/", "/health", "/ready", "/docs", "/openapi.json"}
PUBLIC_FILES = "/static-offline-docs/"
INFER, READ, ADMIN = frozenset({"infer"}), frozenset({"infer", "admin"}), frozenset({"admin"})
METRICS = frozenset({"metrics", "admin"})


class Rule(NamedTuple):
    method: str
    path: re.Pattern[str]
    scopes: frozenset[str]  # of which a key must have one


def _rules(method: str, scopes: frozenset[str], *paths: str) -> list[Rule]:
    return [Rule(method, re.compile(path), scopes) for path in paths]


# Every route that asks for a key has a rule, or the guard answers 404 in its place: a test holds
# this table against the OpenAPI document. `.+` is an adapter's name or reference, with its slashes;
# `.*` an empty name too, which the routes refuse as such. The first rule that fits counts.
RULES = [
    *_rules("POST", INFER, "/encode", "/critic", "/classify", "/tokenize", "/detokenize"),
    *_rules("POST", INFER, "/v1/embeddings", "/rerank", "/v1/rerank", "/v2/rerank"),
    *_rules("POST", INFER, "/", "/embed", "/embed_all", "/similarity", "/predict"),
    # The weights are their owner's property. The router passes over one line end at the end of a
    # path, so /adapters/x/file%0A is the file too: the rule for reading must not be the one for it.
    *_rules("GET", ADMIN, r"(?s:/adapters/.*/file\n?)"),
    *_rules("GET", READ, "/adapters", "(?s:/adapters/.*)", "/diff", "/info"),
    *_rules("GET", READ, "/v1/models", "(?s:/v1/models/.+)"),
    *_rules("PUT", ADMIN, "(?s:/adapters/.*)"),
    *_rules("DELETE", ADMIN, "(?s:/adapters/.*)"),
    *_rules("POST", ADMIN, "(?s:/adapters/.*/(load|unload|pin|unpin|verify))"),
    *_rules("POST", ADMIN, "/v1/(un)?load_lora_adapter"),
    *_rules("GET", ADMIN, "/debug/engine"),
    *_rules("GET", METRICS, "/metrics"),
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
                caller = scope["state"].get("caller")
                if caller is not None and caller.has_quota:
                    send = with_rate_headers(send, caller)
                if error is not None:
                    await _refuse(error, scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        caller = self.keys.caller_of(scope["headers"])
        if caller is None:
            sentence = "a valid API key is needed, as Authorization: Bearer KEY or x-api-key: KEY"
            return RequestError("unauthorized", sentence)
        scope["state"]["caller"] = caller  # of a refused request too: for its metrics
        error = _scope_refusal(caller, scope["method"], scope["path"])
        if error is not None:
            return error
        wait = caller.take_request()
        if wait:
            return _quota_refusal(caller, wait)
        return None


def is_public(method: str, path: str) -> bool:
    """Whether everybody may ask for it, without a key too."""
    return method in ("GET", "HEAD") and (path in PUBLIC or path.startswith(PUBLIC_FILES))


def may_ask(caller: Caller, method: str, path: str) -> bool:
    """Whether the key's scopes allow it."""
    return bool(caller.key.scopes & (needed(method, path) or frozenset()))


@lru_cache(maxsize=256)
def needed(method: str, path: str) -> frozenset[str] | None:
    """The scopes of which a key must have one; None where no route is known for both."""
    rules = (rule for rule in RULES if rule.method == method and rule.path.fullmatch(path))
    rule = next(rules, None)
    return rule.scopes if rule is not None else None


def methods_of(path: str) -> list[str]:
    """Those that a path is known with; none of an unknown path."""
    methods = {rule.method for rule in RULES if rule.path.fullmatch(path)}
    methods |= {"GET"} if is_public("GET", path) else set()
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def _scope_refusal(caller: Caller, method: str, path: str) -> RequestError | None:
    scopes = needed(method, path)
    if scopes is None:
        methods = methods_of(path)
        return wrong_method(methods) if methods else no_route()
    if caller.key.scopes & scopes:
        return None
    names = sorted(scopes)
    sentence = f"the key does not have the scope for this: {' or '.join(names)}"
    return RequestError("forbidden", sentence, scopes=names)


def _quota_refusal(caller: Caller, wait: QuotaWait) -> RequestError:
    key = caller.key
    return RequestError(
        "quota_exceeded",
        f"the key's quota of {wait.of} is used up: {wait.quota}",
        quota=wait.of,
        limit=str(wait.quota),
        key={"id": key.id, "name": key.name[:MAX_NAME]},
        retry_after_s=wait.seconds,
    )


def caller_of(request: Request) -> Caller | None:
    """Whose key the request came with; None on a server without keys."""
    caller: Caller | None = request.scope["state"].get("caller")
    return caller


def key_of(request: Request) -> str:
    """The id of the API key whose share the request's work counts to; "" is everybody without."""
    caller = caller_of(request)
    return caller.key.id if caller is not None else ""


def confined_caller(request: Request) -> Caller | None:
    """The request's key where it is limited to some adapters; None where it may see everything."""
    caller = caller_of(request)
    return caller if caller is not None and caller.key.confined else None


def patterns_of(request: Request) -> tuple[str, ...]:
    """The patterns of names that the request's key may use; empty for a key that may use all."""
    caller = caller_of(request)
    return caller.key.adapters if caller is not None else ()


def check_unconfined(request: Request) -> None:
    """Raises RequestError where the request's key is limited to some adapters."""
    if confined_caller(request) is not None:
        sentence = "the key is limited to some adapters, and this tells of all of them together"
        raise RequestError("forbidden", sentence)


def check_adapter(request: Request, reference: str | None) -> None:
    """Raises RequestError where the request's key may not use this adapter; base is everybody's."""
    caller = caller_of(request)
    if caller is not None and not may_use(caller, reference):
        raise _adapter_refusal(str(reference).partition("@")[0])


def _adapter_refusal(name: str) -> RequestError:
    """It names the adapter, unless that is not a name and so might be anything that was sent."""
    try:
        check_name(name)
    except BadName:
        return RequestError("forbidden", "the key may not use this adapter")
    return RequestError("forbidden", f"the key may not use the adapter {name}", adapter=name)


def may_use(caller: Caller, reference: str | None) -> bool:
    """Whether the key may use this adapter; base is everybody's."""
    return reference in (None, BASE) or caller.key.may_use(reference.partition("@")[0])


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    answer = error_answer(error, scope["path"], scope["state"].get("request_id"))
    scope["state"][CODE] = error.code
    headers = answer.headers
    if error.code == "unauthorized":
        headers["www-authenticate"] = "Bearer"
    if error.code == "method_not_allowed":
        headers["allow"] = ", ".join(methods_of(scope["path"]))
    if any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]):
        headers["connection"] = "close"  # the body is not read, so nothing can follow it
    await JSONAnswer(answer.body, answer.status, headers)(scope, receive, send)
