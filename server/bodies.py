"""A request's body: read with a cap and a deadline, parsed strictly, validated off the loop."""

import asyncio
import gc
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import jiter
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from server.connection import CLIENT, Client
from server.errors import RequestError

# A body of so many bytes takes a turn (server.turns) and is parsed in a worker thread, so that the
# event loop answers meanwhile.
LARGE = 64 << 10
# One: each thread that parses takes Python's lock for 5 ms at a time, and the loop waits for all.
_PARSER = ThreadPoolExecutor(1, "parser")

# What the parser's message has in it, and what is answered.
_PARSER_SAYS = (
    ("duplicate key", "duplicate_key", "an object has a key twice"),
    ("recursion limit", "malformed_json", "the body is nested too deep"),
    ("number out of range", "validation_error", "a number is out of range"),
)

Schema = TypeVar("Schema", bound=BaseModel)


async def read_json(request: Request, schema: type[Schema], max_bytes: int) -> Schema:
    """The body as `schema`. Raises RequestError; no message holds what the client sent."""
    size = check_json_headers(request, max_bytes)
    if size < LARGE:
        settings = request.app.state.settings
        raw = await _read(request, max_bytes, settings.receive_timeout_s)
        return parse(raw, schema, settings.max_inputs)
    async with request.app.state.turns.take(size):
        return await _read_large(request, schema, max_bytes)


async def _read_large(request: Request, schema: type[Schema], max_bytes: int) -> Schema:
    settings, turns = request.app.state.settings, request.app.state.turns
    raw = await _read(request, max_bytes, settings.receive_timeout_s)

    def parse_and_note() -> Schema:
        began = time.monotonic()
        try:
            return parse(raw, schema, settings.max_inputs)
        finally:
            turns.note(len(raw), began)

    return await asyncio.get_running_loop().run_in_executor(_PARSER, parse_and_note)


def check_json_headers(request: Request, max_bytes: int) -> int:
    """The body's declared bytes, or LARGE where it declares none and is not all there yet."""
    if not is_json(header(request, b"content-type")):
        raise RequestError("unsupported_media_type", "the body must be application/json")
    if header(request, b"content-encoding", "identity").lower() != "identity":
        raise RequestError("unsupported_media_type", "a body with a Content-Encoding is not read")
    length = header(request, b"content-length")
    if not length.isdecimal():
        client: Client | None = request.scope.get(CLIENT)
        return 0 if client is not None and client.sent_all else LARGE
    if int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    return int(length)


def is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def header(request: Request, name: bytes, default: str = "") -> str:
    """The first of this name, in lower case; request.headers takes ten times as long for it."""
    for key, value in request.scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return default


async def _read(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    client: Client | None = request.scope.get(CLIENT)
    try:
        if client is not None and client.sent_all:  # nothing to wait for
            return await _read_all(request, max_bytes)
        async with asyncio.timeout(timeout_s):
            return await _read_all(request, max_bytes)
    except TimeoutError as error:
        raise RequestError("receive_timeout", f"the body took over {timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise RequestError("malformed_json", "the client left before its body was there") from error


async def _read_all(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError("body_too_large", f"the body may have {max_bytes} bytes", limit=max_bytes)


def parse(raw: bytes, schema: type[Schema], max_inputs: int) -> Schema:
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise RequestError("validation_error", "the body must be a JSON object")
    if value.keys() - schema.model_fields.keys():  # pydantic would list them all
        known = ", ".join(schema.model_fields)
        raise _unless_infinite(value, f"the body has an unknown key; known are {known}")
    try:
        return schema.model_validate(value, context={"max_inputs": max_inputs})
    except ValidationError as error:
        raise _validation_error(error, value) from error


def parse_json(raw: bytes) -> Any:
    """Strict JSON: UTF-8 without a mark, no key twice, no NaN or Infinity, no lone surrogate."""
    try:
        with _no_collections(len(raw) >= LARGE):
            return jiter.from_json(raw, catch_duplicate_keys=True, allow_inf_nan=False)
    except ValueError as error:
        raise _why_not_json(raw, str(error)) from error


@contextmanager
def _no_collections(large: bool) -> Iterator[None]:
    """A million lists set off collections that triple the time the parser holds everybody up."""
    on = large and gc.isenabled()
    if on:
        gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _why_not_json(raw: bytes, said: str) -> RequestError:
    where = said[said.rfind(" at line ") :] if " at line " in said else ""
    for phrase, code, sentence in _PARSER_SAYS:
        if phrase in said:
            return RequestError(code, f"{sentence}{where}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return RequestError("invalid_utf8", f"the body is not UTF-8, from byte {error.start}")
    value = _lenient_json(text)
    if value is not None and _has_infinity(value):
        return RequestError("non_finite_number", f"NaN and Infinity are not JSON{where}")
    if value is not None:  # Python reads it and the strict parser does not: a lone surrogate
        return RequestError("validation_error", f"a string has a lone surrogate{where}")
    return RequestError("malformed_json", f"the body is not JSON{where}")


def _lenient_json(text: str) -> Any:
    """What Python's reader, which lets NaN and surrogates pass, makes of it; None if nothing."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _has_infinity(value: Any) -> bool:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, float) and not math.isfinite(item):
            return True
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return False


def _validation_error(error: ValidationError, value: Any) -> RequestError:
    """The first fault as a sentence: a key that the schema knows, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputFault) and cause.code != "validation_error":
        return RequestError(cause.code, cause.sentence, **cause.details)
    if isinstance(cause, InputFault):
        return _unless_infinite(value, cause.sentence, **cause.details)
    key = str(first["loc"][0]) if first["loc"] else "body"
    return _unless_infinite(value, f"{key}: {first['msg']}", key=key)


def _unless_infinite(value: Any, sentence: str, **details: Any) -> RequestError:
    """1e400 is JSON, and no number."""
    if _has_infinity(value):
        return RequestError("non_finite_number", "a number is not finite")
    return RequestError("validation_error", sentence, **details)


class InputFault(ValueError):
    """A validator's fault with a code of its own, carried through pydantic."""

    def __init__(self, code: str, sentence: str, **details: Any) -> None:
        super().__init__(sentence)
        self.code, self.sentence, self.details = code, sentence, details
