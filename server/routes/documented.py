"""What the OpenAPI document says of a route: its body, and every error it can answer."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel

from adapters.names import ALIAS_PATTERN, NAME_PATTERN
from server.errors import STATUS, openai_status
from server.guard import is_public
from server.schemas import REFERENCE_PATTERN

HEAD = ("malformed_request", "receive_timeout", "headers_too_large")  # of every route
GUARD = ("unauthorized", "forbidden", "quota_exceeded")  # of every route, once there are keys
READ = ("not_ready", "internal_error")
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

_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "details": {"type": "object"},
                "request_id": {"type": "string"},
            },
        }
    },
}


# Of a route that frees what requests may use
IN_USE: dict[int | str, dict[str, Any]] = {202: {"description": "in_flight requests use it yet."}}
# Of what stands in a path
PATH_PATTERNS = {"name": NAME_PATTERN, "alias": ALIAS_PATTERN, "number": r"^[1-9][0-9]{0,8}$"}


Responses = dict[int | str, dict[str, Any]]  # as FastAPI takes them


def errors(*codes: str) -> Responses:
    """FastAPI's `responses` for these codes of the table, on a route that asks for a key."""
    return _responses((*HEAD, *GUARD, *codes), STATUS.__getitem__)


def openai_errors(*codes: str) -> Responses:
    """The same for a route under /v1, where the statuses are OpenAI's."""
    return _responses((*HEAD, *GUARD, *codes), openai_status)


def public_errors(*codes: str) -> Responses:
    """The same for a route that is open to everybody."""
    return _responses((*HEAD, *codes), STATUS.__getitem__)


def ok(
    schema: type[BaseModel], example: Any = None, *, status: int = 200, says: str = "Done."
) -> Responses:
    """FastAPI's `responses` for a success: the answer's schema, which is for the document alone."""
    entry: dict[str, Any] = {"model": schema, "description": says}
    if example is not None:
        entry["content"] = {"application/json": {"example": example}}
    return {status: entry}


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with what is checked outside the routes: keys, and patterns of names."""
    schemes = {"key": {"type": "http", "scheme": "bearer", "description": "An API key."}}
    document.setdefault("components", {})["securitySchemes"] = schemes
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if not is_public(method.upper(), path):
                operation["security"] = [{"key": []}, {}]  # {}: on a server without keys none
            for parameter in operation.get("parameters", ()):
                pattern = PATH_PATTERNS.get(parameter["name"])
                if parameter["in"] == "path" and pattern:
                    parameter["schema"]["pattern"] = pattern
    return document


def _responses(codes: Iterable[str], status_of: Callable[[str], int]) -> Responses:
    by_status = defaultdict(list)
    for code in codes:
        by_status[status_of(code)].append(code)
    content = {"application/json": {"schema": _ERROR_SCHEMA}}
    return {
        status: {"description": ", ".join(sorted(set(names))), "content": content}
        for status, names in sorted(by_status.items())
    }


def json_body(schema: type[BaseModel], **examples: Any) -> dict[str, Any]:
    """FastAPI's `openapi_extra` for a body that the handler reads itself.

    `examples` are bodies by a short name; each succeeds on the demo as it stands.
    """
    body: dict[str, Any] = {"schema": schema.model_json_schema()}
    if examples:
        body["examples"] = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": body}
    return {"requestBody": {"required": True, "content": content}}


def octet_body() -> dict[str, Any]:
    """The same for a body of bytes."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {"requestBody": {"required": True, "content": content}}


def references(**descriptions: str) -> dict[str, Any]:
    """The same for adapter references that must stand in the query, by their names."""
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": True,
                "description": description,
                "schema": {"type": "string", "pattern": REFERENCE_PATTERN},
            }
            for name, description in descriptions.items()
        ]
    }
