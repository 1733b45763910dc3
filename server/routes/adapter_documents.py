"""What the OpenAPI document says of the adapter routes: parameters, headers, examples."""

from typing import Any

from adapters.listing import SORTS
from server.routes.documented import BYTES, Responses, header_parameter, query

CONDITIONS = ("version_conflict",)  # of a route that takes conditions; malformed: malformed_request

_ETAG = '"3"'


IF_MATCH = header_parameter(
    "If-Match",
    "`*`, or entity tags in quotation marks: change it only if one of them is current; else 412. "
    "A weak tag never matches.",
)
IF_NONE_MATCH = header_parameter(
    "If-None-Match",
    "`*`, or entity tags in quotation marks. A change: only if none of them is current (`*`: only "
    "if it does not exist), else 412. A read: 304 if one of them is current.",
)
_DIGESTS = (
    header_parameter(
        "Content-Digest",
        "RFC 9530: `sha-256=:base64:`, `sha-512=:base64:`. Other algorithms are ignored; a digest "
        "that is not the body's is 422.",
    ),
    header_parameter("Repr-Digest", "RFC 9530; here the same as Content-Digest."),
    header_parameter(
        "x-content-sha256",
        "The body's SHA-256 in hex, for clients without RFC 9530.",
        pattern="^(sha256:)?[0-9A-Fa-f]{64}$",
    ),
)
UPLOAD_PARAMETERS = (
    query("activate", "boolean", "false: store it; what is current stays."),
    query("allow_zero", "boolean", "true: take a set that changes nothing."),
    IF_MATCH,
    IF_NONE_MATCH,
    *_DIGESTS,
)
LIST_PARAMETERS = (
    query("q", "string", "Part of a name or of an alias.", maxLength=200),
    query(
        "sort",
        "string",
        "What the list is sorted by; `used` and `requests` count since the server started.",
        enum=list(SORTS),
        default="name",
    ),
    query("order", "string", "Order.", enum=["asc", "desc"], default="asc"),
    query("limit", "integer", "Rows of a page.", minimum=1, maximum=1000, default=100),
    query(
        "after",
        "string",
        "The cursor that a page gives as `next`. Sorted by name, a name: the page behind it.",
        maxLength=1000,
    ),
)

VERSIONS_PARAMETERS = (
    query("versions_limit", "integer", "Versions.", minimum=1, maximum=1000, default=1000),
    query("versions_after", "integer", "Versions above this number.", minimum=0, default=0),
)

NOT_MODIFIED: Responses = {304: {"description": "The client has it already (If-None-Match)."}}


def with_headers(responses: Responses, *names: str) -> Responses:
    """The responses, of which those of success carry these headers."""
    headers = {
        name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in names
    }
    return {
        status: entry | {"headers": headers} if int(status) < 400 else entry
        for status, entry in responses.items()
    }


_HEADERS = {
    "ETag": f"The entity tag: the version's number in quotation marks, {_ETAG}; of an alias its "
    "generation.",
    "Location": "The adapter's path.",
    "Content-Digest": "RFC 9530: SHA-256 of the body.",
    "Repr-Digest": "RFC 9530: SHA-256 of the file.",
    "Content-Disposition": "A file name.",
}
BINARY = {"schema": BYTES}
FILE: Responses = {
    200: {"description": "The file's bytes.", "content": {"application/octet-stream": BINARY}}
}


def upload_body() -> dict[str, Any]:
    """An adapter file, or a PEFT folder in one of its forms."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    folder = {"type": "object", "properties": dict.fromkeys(names, BYTES), "required": list(names)}
    content = {
        "application/octet-stream": BINARY,
        "application/zip": BINARY,
        "application/x-tar": BINARY,
        "application/gzip": BINARY,
        "multipart/form-data": {"schema": folder},
    }
    return {"requestBody": {"required": True, "content": content}}


# Examples of answers.

_DIGEST = "sha256:" + "5f0c1d8a" * 8
_ROW: dict[str, Any] = {
    "name": "shakespeare",
    "version": 2,
    "aliases": {"current": {"version": 2, "previous": 1, "generation": 2}},
    "versions": [1, 2],
    "digest": _DIGEST,
    "rank": 8,
    "bytes": 197_904,
    "created_at": 1767225600.0,
    "resident": True,
    "in_flight": 0,
    "requests": 12,
    "last_used": 1767229200.0,
}
_PLACE = {"resident": True, "pinned": False, "pin_held": False, "in_flight": 0}
_VERSION: dict[str, Any] = {
    "version": 2,
    "digest": _DIGEST,
    "bytes": 197_904,
    "created_at": 1767225600.0,
    "rank": 8,
    "probe_delta": 0.31,
    "applied": {
        "lora": {"0": {"attn.lora_qkv": 8}},
        "norms": ["transformer.ln_f"],
        "critic": True,
        "calibration": False,
        "classifier": False,
        "sequence_head": False,
        "cls_embedding": False,
    },
    "labels": [],
    "metadata": {"format": "trunkline-adapter/1", "lora_alpha": "16.0"},
    "damaged": False,
}
LIST_EXAMPLE = {"object": "list", "data": [_ROW], "next": None, "unusable": []}
UPLOADED_EXAMPLE = _VERSION | {"name": "shakespeare"}
VERSION_EXAMPLE = {"name": "shakespeare"} | _VERSION | _PLACE
_AUDIT = {
    "at": 1767225600.0,
    "who": "ci 4f2a",
    "action": "put",
    "detail": {"version": 2, "digest": _DIGEST},
}
ADAPTER_EXAMPLE = _ROW | {
    "versions": [_VERSION | _PLACE],
    "versions_next": None,
    "audit": [_AUDIT],
}
ALIAS_EXAMPLE = {
    "name": "shakespeare",
    "alias": "stable",
    "version": 1,
    "previous": None,
    "generation": 1,
}
RESIDENCY_EXAMPLE = {"name": "shakespeare", "version": 2, "digest": _DIGEST} | _PLACE
REMOVED_EXAMPLE = {"name": "shakespeare", "version": None, "in_flight": 0}
VERIFIED_EXAMPLE = {"name": "shakespeare", "sound": True, "versions": {"1": None, "2": None}}
LOADED_EXAMPLE = {"status": "success", "name": "tone", "version": 1, "digest": _DIGEST}
UNLOADED_EXAMPLE = {"status": "success", "in_flight": 0}
