"""Holds every answer that a test gets against the OpenAPI document of the server that gave it.

An answer must have a status that its operation states; its JSON must fit the schema that is stated
for it, with no field that the document does not name; an error's code must be one of those that the
operation states for this status.
"""

import re
from functools import cached_property
from typing import Any

import httpx
import jsonschema_rs
import orjson

from server.named_path import route_path

# Of what is no operation of the document
UNSTATED = re.compile("/|/docs(/.*)?|/static-offline-docs/.*")
UNKNOWN = {401, 403, 404, 405, 422, 429}  # what an unknown path or method is answered
LARGEST = 100_000  # bytes of a body that is held against its schema: more would take long
NAME = "[A-Za-z0-9._/@:-]+"

Json = dict[str, Any]


class Document:
    """The operations of an OpenAPI document, with validators for their answers."""

    def __init__(self, document: Json) -> None:
        self.document = document
        self.validators: dict[str, jsonschema_rs.Validator] = {}

    @cached_property
    def routes(self) -> list[tuple[re.Pattern[str], str]]:
        """A pattern and its path, the longest path first."""
        paths = sorted(self.document["paths"], key=len, reverse=True)
        return [(re.compile(_pattern(path)), path) for path in paths]

    @cached_property
    def closed(self) -> Json:
        """The components; no object has a property that its schema does not name."""
        schemas = self.document["components"]["schemas"]
        return {"schemas": {name: _closed(schema) for name, schema in schemas.items()}}

    def operation(self, method: str, path: str) -> tuple[str, Json] | None:
        """The template and the operation that answer it."""
        bare = route_path(path)  # below /as/.../- the routes are the same
        for pattern, template in self.routes:
            item = self.document["paths"][template]
            if method in item and pattern.fullmatch(bare):
                return template, item[method]
        return None

    def faults(self, schema: Json, body: Any, key: str) -> list[str]:
        """What in `body` is not as `schema` says; `key` names the schema in the cache."""
        if key not in self.validators:
            whole = {"components": self.closed, **_closed(schema)}
            self.validators[key] = jsonschema_rs.Draft202012Validator(whole)
        return [_sentence(error) for error in self.validators[key].iter_errors(body)]


def demand_stated(document: Document, answer: httpx.Response) -> None:
    """Raises AssertionError for an answer that is not what the document states."""
    request, path = answer.request, answer.request.url.path
    if answer.status_code == 499:  # the client has left: nobody reads it
        return
    method = "get" if request.method == "HEAD" else request.method.lower()
    found = document.operation(method, path)
    where = f"{request.method} {path} answered {answer.status_code}"
    if found is None and UNSTATED.fullmatch(route_path(path)):
        return
    if found is None:
        assert answer.status_code in UNKNOWN, f"{where}: the path is not stated"
        return
    template, operation = found
    stated = operation["responses"].get(str(answer.status_code))
    assert stated is not None, f"{where}, which is not stated"
    body = _small_json(answer)
    if body is None:
        return
    media = stated.get("content", {}).get("application/json")
    assert media is not None, f"{where} with JSON, which is not stated"
    key = f"{method} {template} {answer.status_code}"
    faults = document.faults(media["schema"], body[0], key)
    assert not faults, f"{where}, but not as the document says: {faults[:3]}"
    _demand_code(stated, body[0], where)


def _demand_code(stated: Json, body: Any, where: str) -> None:
    """An error that names a code names one that is stated."""
    error = body.get("error") if isinstance(body, dict) else None
    if "x-codes" in stated and isinstance(error, dict) and "code" in error:
        assert error["code"] in stated["x-codes"], f"{where} with {error['code']}, not stated"


def _small_json(answer: httpx.Response) -> tuple[Any] | None:
    """The body, in a tuple since it may be null; None where it is large, streamed or not JSON."""
    kind = answer.headers.get("content-type", "").partition(";")[0]
    size = answer.headers.get("content-length", "")
    if kind != "application/json" or answer.request.method == "HEAD" or not size.isdigit():
        return None
    return (orjson.loads(answer.read()),) if 0 < int(size) <= LARGEST else None


def _pattern(path: str) -> str:
    pattern = re.sub(r"\\{(name|model)\\}", NAME, re.escape(path))
    return re.sub(r"\\{\w+\\}", "[^/]+", pattern)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _closed(value) for key, value in schema.items()}
    closes = "properties" in inner and "additionalProperties" not in inner
    return inner | ({"additionalProperties": False} if closes else {})


def _sentence(error: Any) -> str:
    """Where and why; of a union, why each of its members does not fit."""
    members = getattr(error.kind, "context", None)
    if members:
        return " or ".join(_sentence(member[0]) for member in members if member)
    place = "/".join(map(str, error.instance_path))
    return f"{place or 'the body'}: {error.message[:300]}"
