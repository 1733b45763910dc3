"""A request's body: read with a cap and a deadline, parsed strictly, validated off the loop."""

import asyncio
import difflib
import gc
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import jiter
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from server.body_memory import LargeBody
from server.connection import CLIENT, Client
from server.errors import RequestError
from server.guard import key_of
from server.json_cost import check_cost
from server.leaving import unless_client_leaves
from server.strict_model import StrictModel
from server.turns import Turns

# A body of so many bytes takes a turn (server.turns) and is parsed in a worker thread, so that the
# event loop answers meanwhile.
LARGE = 64 << 10

# What the parser's message has in it, and what is answered.
_PARSER_SAYS = (
    ("duplicate key", "duplicate_key", "an object has a key twice"),
    ("recursion limit", "malformed_json", "the body is nested too deep"),
    ("number out of range", "validation_error", "a number is out of range"),
)

_NAMEABLE = re.compile(r"[A-Za-z0-9_.-]{1,40}")  # an unknown key that an answer may name

_OTHER_NAMES = {"model": "adapter", "text": "inputs", "texts": "inputs", "sentences": "inputs"}

Schema = TypeVar("Schema", bound=StrictModel)


async def read_json(request: Request, schema: type[Schema], max_bytes: int) -> Schema:
    """The body as `schema`. Raises RequestError; no message holds what the client sent."""
    size = check_json_headers(request, max_bytes)
    if size < LARGE:
        settings = request.app.state.settings
        raw = await _read(request, max_bytes, settings.receive_timeout_s)
        return parse(raw, schema, settings.max_inputs)
    turns: Turns = request.app.state.turns
    async with turns.take(size, key_of(request)) as place:
        return await _read_large(request, schema, max_bytes, place)


async def _read_large(
    request: Request, schema: type[Schema], max_bytes: int, place: LargeBody
) -> Schema:
    settings, turns = request.app.state.settings, request.app.state.turns
    raw = await _read(request, max_bytes, settings.receive_timeout_s, place)
    work = partial(_parse_large, raw, schema, settings.max_inputs, settings.max_request_tokens)
    return await unless_client_leaves(request, turns.parse(place, work))


def _parse_large(raw: bytes, schema: type[Schema], max_inputs: int, max_tokens: int) -> Schema:
    check_cost(raw, max_tokens)
    return parse(raw, schema, max_inputs)


def check_json_headers(request: Request, max_bytes: int) -> int:
    """The body's declared bytes, or LARGE where it declares none and is not all there yet."""
    if not is_json(header(request, b"content-type")):
        raise RequestError("unsupported_media_type", "the body must be application/json")
    if header(request, b"content-encoding", "identity").lower() != "identity":
        raise RequestError("unsupported_media_type", "a body with a Content-Encoding is not read")
    size = declared_length(header(request, b"content-length"))
    if size is None:
        client: Client | None = request.scope.get(CLIENT)
        return 0 if client is not None and client.sent_all else LARGE
    if size > max_bytes:
        raise _too_large(max_bytes)
    return size


def declared_length(text: str) -> int | None:
    """A Content-Length, however many zeros it begins with; None for what is none."""
    if not text.isdecimal():
        return None
    return int(text.lstrip("0")[:20] or "0")


def is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def header(request: Request, name: bytes, default: str = "") -> str:
    """The first of this name, in lower case; request.headers takes ten times as long for it."""
    for key, value in request.scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return default


async def _read(
    request: Request, max_bytes: int, timeout_s: float, place: LargeBody | None = None
) -> bytes:
    client: Client | None = request.scope.get(CLIENT)
    try:
        if client is not None and client.sent_all:  # nothing to wait for
            return await _read_all(request, max_bytes, place)
        async with asyncio.timeout(timeout_s):
            return await _read_all(request, max_bytes, place)
    except TimeoutError as error:
        raise RequestError("receive_timeout", f"the body took over {timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise RequestError("malformed_json", "the client left before its body was there") from error


async def _read_all(request: Request, max_bytes: int, place: LargeBody | None) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        if place is not None:
            await place.memory.room(place)
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        if place is not None:
            place.memory.received(place, len(part))
        parts.append(part)
    return b"".join(parts)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError("body_too_large", f"the body may have {max_bytes} bytes", limit=max_bytes)


def parse(raw: bytes, schema: type[Schema], max_inputs: int) -> Schema:
    """The body as `schema`; null counts as absent for every field that may be absent."""
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise RequestError("validation_error", "the body must be a JSON object")
    if schema.nested is not None and schema.nested in value:
        value = _flat(value, schema.nested)
    if None in value.values():
        value = {key: item for key, item in value.items() if item is not None}
    if value.keys() - schema.model_fields.keys():
        value = _without_elsewhere(value, schema)
    try:
        return schema.model_validate(value, context={"max_inputs": max_inputs})
    except ValidationError as error:
        raise _validation_error(error, value) from error


def _flat(value: dict[str, Any], key: str) -> dict[str, Any]:
    """The body with the fields that its object at `key` holds; the body's own come first."""
    inner = value[key] if value[key] is not None else {}
    if not isinstance(inner, dict):
        raise _unless_infinite(value, f"{key}: must be an object", field=key)
    return inner | value


def _without_elsewhere(value: dict[str, Any], schema: type[StrictModel]) -> dict[str, Any]:
    """The body without other servers' fields, where they change nothing. Raises RequestError."""
    for key in value.keys() - schema.model_fields.keys():
        field = schema.elsewhere.get(key)
        if field is None:
            raise _unknown_key(value, key, schema)
        if field.harmless is not None and value[key] not in field.harmless:
            raise _unless_infinite(value, f"{key} is refused: {field.why}", field=key)
        if has_infinity(value[key]):  # also where the value is passed over
            raise RequestError("non_finite_number", f"{key}: a number is not finite", field=key)
    return {key: item for key, item in value.items() if key in schema.model_fields}


def _unknown_key(value: dict[str, Any], key: str, schema: type[StrictModel]) -> RequestError:
    """It names the key where that is a short plain word, and the field that is nearest to it."""
    known = ", ".join(schema.model_fields)
    if not _NAMEABLE.fullmatch(key):
        return _unless_infinite(value, f"the body has an unknown key; known are {known}")
    near = difflib.get_close_matches(key.lower(), schema.model_fields, n=1)
    other = _OTHER_NAMES.get(key.lower())
    if other in schema.model_fields:  # the same thing, called so by other servers
        near = [other]
    meant = f"; the nearest known is {near[0]}" if near else ""
    sentence = f"{key} is an unknown key{meant}; known are {known}"
    return _unless_infinite(value, sentence, field=key)


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
    if value is not None and has_infinity(value):
        return RequestError("non_finite_number", f"NaN and Infinity are not JSON{where}")
    if value is not None:  # Python reads it and the strict parser does not: a lone surrogate
        return RequestError("validation_error", f"a string has a lone surrogate{where}")
    return RequestError("malformed_json", f"the body is not JSON{where}")


def _lenient_json(text: str) -> Any:
    """What Python's reader, which lets NaN and surrogates pass, makes of it; None if nothing."""
    try:
        with _no_collections(len(text) >= LARGE):
            return json.loads(text)
    except (ValueError, RecursionError):
        return None


def has_infinity(value: Any) -> bool:
    """Whether a number in it, however deep, is too large for one: 1e400 is JSON."""
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
    """The first fault as a sentence: the field that it is in, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = _field(first["loc"])
    cause = first.get("ctx", {}).get("error")
    if not isinstance(cause, InputFault):
        return _unless_infinite(value, f"{field or 'body'}: {first['msg']}", field=field or "body")
    sentence = cause.sentence
    details = {name: item for name, item in cause.details.items() if item is not None}
    row, part = details.get("row"), details.get("field")
    field = f"{field}.{part}" if field and part else part or field
    field = field if row is None else f"{field}[{row}]"
    if field:
        sentence, details = f"{field}: {sentence}", details | {"field": field}
    if cause.code == "validation_error":
        return _unless_infinite(value, sentence, **details)
    return RequestError(cause.code, sentence, **details)


def _field(loc: tuple[int | str, ...]) -> str:
    """`adapters[3]` of ("adapters", 3). Deeper parts can be keys of the client's: left out."""
    index = f"[{loc[1]}]" if len(loc) > 1 and isinstance(loc[1], int) else ""
    return f"{loc[0]}{index}" if loc else ""


def _unless_infinite(value: Any, sentence: str, **details: Any) -> RequestError:
    """1e400 is JSON, and no number."""
    if has_infinity(value):
        return RequestError("non_finite_number", "a number is not finite")
    return RequestError("validation_error", sentence, **details)


class InputFault(ValueError):
    """A validator's fault with a code of its own, carried through pydantic."""

    def __init__(self, code: str, sentence: str, **details: Any) -> None:
        super().__init__(sentence)
        self.code, self.sentence, self.details = code, sentence, details
