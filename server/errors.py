"""The table: every code an answer can carry and its status. Handlers contain no try."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import TrunklineError
from server.named_path import route_path

STATUS = {
    "malformed_request": 400,
    "malformed_json": 400,
    "invalid_utf8": 400,
    "duplicate_key": 400,
    "non_finite_number": 400,
    "token_ids_refused": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "adapter_not_found": 404,
    "version_not_found": 404,
    "adapter_damaged": 404,
    "method_not_allowed": 405,
    "receive_timeout": 408,
    "name_conflict": 409,
    "critic_not_available": 409,
    "classifier_not_available": 409,
    "length_required": 411,
    "version_conflict": 412,
    "body_too_large": 413,
    "too_many_inputs": 413,
    "too_many_tokens": 413,
    "unsupported_media_type": 415,
    "validation_error": 422,
    "sequence_too_long": 422,
    "token_out_of_range": 422,
    "untokenizable_text": 422,
    "empty_input": 422,
    "invalid_adapter": 422,
    "adapter_has_no_effect": 422,
    "non_finite_result": 424,
    "quota_exceeded": 429,
    "headers_too_large": 431,
    "internal_error": 500,
    "overloaded": 503,
    "draining": 503,
    "not_ready": 503,
    "read_only": 503,
    "deadline_exceeded": 504,
    "storage_full": 507,
}

MAX_ERROR_BYTES = 4096
CODE = "error_code"  # of a request's state: the code of the error that it was answered with


class RequestError(TrunklineError):
    """A fault of the request that the edge itself finds; its code is one of STATUS."""

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        assert code in STATUS, f"{code} is not in the table"
        self.code = code


def no_route() -> RequestError:
    return RequestError("not_found", "there is no such route; /docs lists all of them")


def wrong_method(methods: Sequence[str]) -> RequestError:
    """The error of a known path that was asked with another method than these."""
    return RequestError("method_not_allowed", f"this route takes {', '.join(methods)} only")


@dataclass(frozen=True)
class ErrorAnswer:
    """An error as it is sent."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


OPENAI_PREFIXES = ("/v1/", "/v2/")  # /v2/rerank: its clients know OpenAI's statuses too
TEI_PATHS = {"/", "/embed", "/embed_all", "/similarity", "/predict", "/rerank"}
# text-embeddings-inference has statuses of its own for these.
_TEI_STATUS = {"sequence_too_long": 413, "overloaded": 429}
# Its generated client knows these types and Validation, and fails over any other.
_TEI_TYPES = {
    "untokenizable_text": "Tokenizer",
    "token_out_of_range": "Tokenizer",
    "overloaded": "Overloaded",
    "quota_exceeded": "Overloaded",
    "draining": "Unhealthy",
    "not_ready": "Unhealthy",
    "non_finite_result": "Backend",
    "internal_error": "Backend",
    "deadline_exceeded": "Backend",
}


def error_answer(error: TrunklineError, path: str, request_id: str | None) -> ErrorAnswer:
    """The error in the shape, and with the status, that clients of this path expect."""
    seconds = error.details.get("retry_after_s")
    headers = {} if seconds is None else {"retry-after": str(seconds)}
    path = route_path(path)
    if path.startswith(OPENAI_PREFIXES):
        return ErrorAnswer(openai_status(error.code), openai_error_body(error), headers)
    if path in TEI_PATHS:
        return ErrorAnswer(tei_status(error.code), tei_error_body(error, request_id), headers)
    return ErrorAnswer(STATUS[error.code], error_body(error, request_id), headers)


def openai_status(code: str) -> int:
    """Under /v1 a fault of the request is 400, never 422: OpenAI's clients know no other."""
    return 400 if STATUS[code] == 422 else STATUS[code]


def tei_status(code: str) -> int:
    """The status that text-embeddings-inference gives a fault of this kind."""
    return _TEI_STATUS.get(code, STATUS[code])


def error_body(error: TrunklineError, request_id: str | None) -> dict[str, Any]:
    """The one error shape of API.md; it never holds what the client sent."""
    shape = {"code": error.code, "message": error.message, "details": error.details}
    return {"error": shape | {"request_id": request_id}}


def openai_error_body(error: TrunklineError) -> dict[str, Any]:
    """The shape of /v1: what the official client makes its exceptions of."""
    kind = "server_error" if STATUS[error.code] >= 500 else "invalid_request_error"
    param = error.details.get("field")
    return {"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}


def tei_error_body(error: TrunklineError, request_id: str | None) -> dict[str, Any]:
    """text-embeddings-inference's two keys, and beside them our own code and details."""
    theirs = {"error": error.message, "error_type": _TEI_TYPES.get(error.code, "Validation")}
    return theirs | {"code": error.code, "details": error.details, "request_id": request_id}
