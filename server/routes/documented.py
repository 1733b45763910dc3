"""What a route states for the OpenAPI document: its body, its parameters, and every answer."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from server.answer_shapes.errors import Error, OpenAIError
from server.answer_shapes.tei import TeiError
from server.errors import STATUS, openai_status, tei_status
from server.schemas import REFERENCE_PATTERN

HEAD = ("malformed_request", "receive_timeout", "headers_too_large")  # of every route
GUARD = ("unauthorized", "forbidden", "quota_exceeded")  # of every route, once there are keys
READ = ("not_ready", "internal_error", "overloaded")  # overloaded: it can't be read just now
BODY = (
    "malformed_json",
    "invalid_utf8",
    "duplicate_key",
    "non_finite_number",
    "receive_timeout",
    "body_too_large",
    "unsupported_media_type",
    "validation_error",
    "empty_input",
    *READ,
)
UPLOAD = (
    "receive_timeout",
    "version_conflict",
    "name_conflict",
    "body_too_large",
    "unsupported_media_type",
    "validation_error",
    "invalid_adapter",
    "adapter_has_no_effect",
    "overloaded",
    "draining",
    "read_only",
    "storage_full",
    *READ,
)
TOKENIZE = (*BODY, "untokenizable_text", "token_out_of_range")
INFER = (
    *TOKENIZE,
    "adapter_not_found",
    "version_not_found",
    "adapter_damaged",
    "too_many_inputs",
    "too_many_tokens",
    "sequence_too_long",
    "non_finite_result",
    "overloaded",
    "draining",
    "deadline_exceeded",
)

Responses = dict[int | str, dict[str, Any]]  # as FastAPI takes them
Parameter = dict[str, Any]
COMPONENTS = "#/components/schemas/{model}"
CODES = "x-codes"
BYTES = {"type": "string", "format": "binary"}
NULL = "\0null"  # in examples: FastAPI leaves nulls out of its document
# Where the server has bytes that may be uploaded as they are. Not `externalValue`: generators of
# clients would look for that file beside the document.
STORED_AT = "x-stored-at"
STORED = {"stored": {"summary": "An adapter file.", STORED_AT: "/adapters/verses/file"}}
ERROR_SHAPES = (Error, OpenAIError, TeiError)  # what error answers refer to


def errors(*codes: str) -> Responses:
    """FastAPI's `responses` for these codes of the table, on a route that asks for a key."""
    return _responses((*HEAD, *GUARD, *codes), STATUS.__getitem__, Error)


def openai_errors(*codes: str) -> Responses:
    """The same for a route under /v1, where the shape and the statuses are OpenAI's."""
    return _responses((*HEAD, *GUARD, *codes), openai_status, OpenAIError)


def tei_errors(*codes: str) -> Responses:
    """The same for a route of text-embeddings-inference, in its shape and with its statuses."""
    return _responses((*HEAD, *GUARD, *codes), tei_status, TeiError)


def public_errors(*codes: str) -> Responses:
    """The same for a route that is open to everybody."""
    return _responses((*HEAD, *codes), STATUS.__getitem__, Error)


def _responses(
    codes: Iterable[str], status_of: Callable[[str], int], shape: type[BaseModel]
) -> Responses:
    """An entry for each status; `x-codes` lists the codes that it can carry on this route.

    `code` itself stays a plain string, so that a client that was generated before a code was added
    reads the answers that carry it.
    """
    by_status: dict[int, set[str]] = defaultdict(set)
    for code in codes:
        by_status[status_of(code)].add(code)
    content = {"application/json": {"schema": component(shape)}}
    return {
        status: {"description": ", ".join(sorted(names)), "content": content, CODES: sorted(names)}
        for status, names in sorted(by_status.items())
    }


def component(shape: type[BaseModel]) -> dict[str, Any]:
    """A reference to the named schema of `shape`; the document must have it (ERROR_SHAPES)."""
    return {"$ref": COMPONENTS.format(model=shape.__name__)}


def ok(
    schema: type[BaseModel],
    example: Any = None,
    *,
    status: int = 200,
    says: str = "Done.",
    headers: Mapping[str, str] | None = None,
    also: Mapping[str, Any] | None = None,
) -> Responses:
    """FastAPI's `responses` for a success: the answer's schema, which is for the document alone.

    `headers` are the answer's own, with what each says; `also` are its schemas under other content
    types, which a request names in its Accept header.
    """
    content: dict[str, Any] = {kind: {"schema": shape} for kind, shape in (also or {}).items()}
    if example is not None:
        content["application/json"] = {"example": _kept(example)}
    entry: dict[str, Any] = {"model": schema, "description": says}
    if content:
        entry["content"] = content
    if headers:
        entry["headers"] = {name: _header(text) for name, text in headers.items()}
    return {status: entry}


def _header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


def json_body(schema: type[BaseModel], **examples: Any) -> dict[str, Any]:
    """FastAPI's `openapi_extra` for a body that the handler reads itself.

    `examples` are bodies by a short name; each succeeds on the demo as it stands.
    """
    shape = schema.model_json_schema(ref_template=COMPONENTS)  # the document names it
    body: dict[str, Any] = {"schema": shape}
    if examples:
        body["examples"] = {name: {"value": _kept(value)} for name, value in examples.items()}
    content = {"application/json": body}
    return {"requestBody": {"required": True, "content": content}}


def _kept(example: Any) -> Any:
    """The example with NULL in place of None."""
    if isinstance(example, dict):
        return {key: _kept(value) for key, value in example.items()}
    if isinstance(example, list | tuple):
        return [_kept(value) for value in example]
    return NULL if example is None else example


def parameters(*entries: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's `openapi_extra` for what a handler reads of the query and of the headers."""
    return {"parameters": list(entries)}


def query(name: str, kind: str, description: str, **more: Any) -> Parameter:
    """A query parameter of the JSON type `kind`; `more` goes into its schema."""
    return _parameter("query", name, {"type": kind, **more}, description)


def header_parameter(name: str, description: str, **more: Any) -> Parameter:
    """A request header. Accept, Content-Type and Authorization are never listed, by OpenAPI."""
    return _parameter("header", name, {"type": "string", **more}, description)


def _parameter(place: str, name: str, schema: dict[str, Any], description: str) -> Parameter:
    return {"name": name, "in": place, "description": description, "schema": schema}


def references(**described: tuple[str, str]) -> dict[str, Any]:
    """The parameters of a query that must hold adapter references: description and example."""
    ones = [
        query(name, "string", description, pattern=REFERENCE_PATTERN)
        | {"required": True, "example": example}
        for name, (description, example) in described.items()
    ]
    return parameters(*ones)
