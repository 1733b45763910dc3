"""Shed: refuses what the queue would refuse, from the request's bytes, before a task is made of it.

Sent through the middleware, the parser, validation and the tokeniser, a flood of requests to be
refused would take the cores, and Python's lock, from those that are answered. So while the queue
is long, of a body that came with its head the adapter alone is read.
"""

import time
from collections.abc import Collection

import msgspec
import orjson
from starlette.types import Scope

from adapters.errors import TrunklineError
from server.bodies import is_json
from server.connection import Refusal
from server.cors import Cors
from server.engine.errors import Overloaded
from server.errors import CODE, error_answer
from server.guard import may_ask, may_use
from server.keys import Caller, KeyRing
from server.middleware import note_answer, request_id_of
from server.named_path import route_path, split_path
from server.paths import routed
from server.rate_headers import rate_headers
from server.schemas import MAX_ADAPTERS
from server.state import ServerState


class _Named(msgspec.Struct):
    """What of a body names adapters; the rest is passed over."""

    adapter: str | None = None
    adapters: list[str] | None = None
    model: str | None = None  # in OpenAI's shape
    parameters: msgspec.Raw = msgspec.Raw(b"null")  # huggingface_hub's options


BY_MODEL = {"/v1/embeddings"}  # where `model` names the adapter

_NAMED = msgspec.json.Decoder(_Named)


class Shed:
    """Used on the event loop alone. It refuses as the way behind it would, only sooner.

    What it is not sure of it lets pass: there a request is refused for its own faults, if it has
    some, or for the queue.
    """

    def __init__(
        self, state: ServerState, keys: KeyRing, paths: Collection[str], cors: Cors
    ) -> None:
        self._state, self._keys, self._paths = state, keys, frozenset(paths)
        self._cors = cors

    def __call__(self, scope: Scope, body: bytes) -> Refusal | None:
        """The refusal of a request whose body is all here; None lets it pass."""
        engine = self._state.engine
        if not engine.admission.crowded or not engine.ready:
            return None
        began = time.monotonic()
        path = routed(scope["path"], self._state.settings.root_path, scope["method"])
        if scope["method"] != "POST" or route_path(path) not in self._paths:
            return None
        # The connection's own scope goes the usual way if it passes.
        scope = {**scope, "path": path, "state": {}}
        references = _references(scope, body, self._state.backbone.id)
        error = self._error(scope, references) if references else None
        return self._told(scope, error, began) if error is not None else None

    def _error(self, scope: Scope, references: Collection[str | None]) -> Overloaded | None:
        caller = None
        self._keys.refresh()
        if self._keys.configured:
            caller = self._keys.caller_of(scope["headers"])
            if caller is None or not _allowed(caller, scope, references):
                return None
            scope["state"]["caller"] = caller
        admission = self._state.engine.admission
        try:
            key = caller.key.id if caller else ""
            error = admission.refusal(references, admission.max_wait_s, key)
        except TrunklineError:  # a reference to nothing
            return None
        if error is None or caller is None:
            return error
        return None if caller.take_request() else error  # a quota that is used up is told first

    def _told(self, scope: Scope, error: Overloaded, began: float) -> Refusal:
        request_id = request_id_of(scope)
        answer = error_answer(error, scope["path"], request_id.decode())
        headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id)]
        headers += [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        headers += self._cors.headers(scope["headers"])
        scope["state"][CODE] = error.code
        caller = scope["state"].get("caller")
        headers += rate_headers(caller) if caller is not None else []
        facts = {"request_id": request_id.decode()}  # no task's context has it
        route = route_path(scope["path"])
        note_answer(self._state.metrics, scope, route, answer.status, began, lambda: facts)
        return Refusal(answer.status, headers, orjson.dumps(answer.body), last=self._state.draining)


def _allowed(caller: Caller, scope: Scope, references: Collection[str | None]) -> bool:
    return may_ask(caller, scope["method"], route_path(scope["path"])) and all(
        may_use(caller, reference) for reference in references
    )


def _references(scope: Scope, body: bytes, backbone_id: str) -> Collection[str | None]:
    """What the body names; nothing where that can't be told from it alone."""
    headers = dict(scope["headers"])  # of two of a name the last: let pass or not, it is no matter
    plain = headers.get(b"content-encoding", b"identity") == b"identity"
    if not plain or not is_json(headers.get(b"content-type", b"").decode("latin-1")):
        return ()
    try:
        named = _NAMED.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return ()
    if bytes(named.parameters) != b"null":  # it may hold the adapter
        return ()
    return _of_route(scope["path"], named, backbone_id)


def _of_route(path: str, named: _Named, backbone_id: str) -> Collection[str | None]:
    """What counts on this route: the path's reference, or `model`, or `adapter` or `adapters`."""
    parts = split_path(path)
    if parts is not None:
        return _unless_another(parts.reference, named)
    if path in BY_MODEL:
        return (named.model,) if named.model not in (None, backbone_id) else ()
    if named.model is not None:  # a rerank route decides by rules of its own
        return ()
    if named.adapters is None:
        return (named.adapter,)
    if named.adapter is not None or len(named.adapters) > MAX_ADAPTERS:
        return ()
    return set(named.adapters)


def _unless_another(reference: str, named: _Named) -> Collection[str | None]:
    """The path's reference, unless the body names an adapter otherwise: that is a fault."""
    if named.adapters is not None or named.adapter not in (None, reference):
        return ()
    return (reference,)
