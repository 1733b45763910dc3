"""What the OpenAPI document says of a route: its body, and every error it can answer."""

from collections import defaultdict
from typing import Any

from pydantic import BaseModel

from server.errors import STATUS

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


def errors(*codes: str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for these codes of the table."""
    by_status = defaultdict(list)
    for code in (*GUARD, *codes):
        by_status[STATUS[code]].append(code)
    content = {"application/json": {"schema": _ERROR_SCHEMA}}
    return {
        status: {"description": ", ".join(sorted(set(names))), "content": content}
        for status, names in sorted(by_status.items())
    }


def json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """FastAPI's `openapi_extra` for a body that the handler reads itself."""
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def octet_body() -> dict[str, Any]:
    """The same for a body of bytes."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {"requestBody": {"required": True, "content": content}}
