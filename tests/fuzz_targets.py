"""What any bytes at all may do to the parsers: nothing but what the tables of errors say.

Each check says whether the bytes were taken. It raises AssertionError, or whatever a parser should
not have raised.
"""

import asyncio
import json
import re

import safetensors
from safetensors import SafetensorError
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from adapters.errors import Invalid
from adapters.format import parse_header
from server.bodies import parse, parse_json
from server.connection import Connection, Refusal
from server.errors import MAX_ERROR_BYTES, STATUS, RequestError, error_body
from server.schemas import EncodeRequest

STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def check_adapter_header(data: bytes) -> bool:
    """Refused with a reason, or read as the safetensors library reads it: stricter, never laxer."""
    refusal = None
    try:
        header = parse_header(data)
    except Invalid as error:
        refusal = error
    if refusal is not None:
        assert refusal.details["reason"]
        assert len(refusal.message) < MAX_ERROR_BYTES
        return False
    try:
        theirs = dict(safetensors.deserialize(data))
    except SafetensorError as error:
        raise AssertionError("ours takes what the library refuses") from error
    assert {name: list(entry.shape) for name, entry in header.tensors.items()} == {
        name: entry["shape"] for name, entry in theirs.items()
    }
    return True


def check_json_body(data: bytes) -> bool:
    """Refused with a code of the table and a small answer, or read as Python reads it."""
    refusal = None
    try:
        value = parse_json(data)
        assert json.loads(data.decode("utf-8")) == value
        parse(data, EncodeRequest, 64)
    except RequestError as error:
        refusal = error
    if refusal is not None:
        assert STATUS[refusal.code] < 500
        assert len(json.dumps(error_body(refusal, "0" * 32)).encode()) <= MAX_ERROR_BYTES
    return refusal is None


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.closed = bytearray(), False

    def write(self, data: bytes) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the whole body and answers 200."""
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def _shed(_: Scope, body: bytes) -> Refusal | None:
    """Refuses some of what came whole."""
    return Refusal(429, [], b"{}") if len(body) % 2 else None


def check_head(data: bytes) -> bool:
    """Some bytes on a connection, in two pieces: answers of the table, and nothing raised."""
    return asyncio.run(_check_head(data))


async def _check_head(data: bytes) -> bool:
    config = Config(_answer, http=Connection, log_config=None, access_log=False, ws="none")
    config.load()
    config.loaded_app = _answer
    wire, faults = Wire(), []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: faults.append(context))
    connection = Connection(config, ServerState(), {}, loop, shed=_shed)
    connection.connection_made(wire)
    for part in (data[: len(data) // 2], data[len(data) // 2 :]):
        if part and not wire.closed:
            connection.data_received(part)
        for _ in range(8):
            await asyncio.sleep(0)
    connection.connection_lost(None)
    for _ in range(8):
        await asyncio.sleep(0)
    assert not faults, faults
    statuses = {int(status) for status in STATUS_LINE.findall(wire.sent)}
    assert statuses <= {100, 200, *STATUS.values()}
    assert not {status for status in statuses if status >= 500}
    return 200 in statuses


CHECKS = (check_adapter_header, check_json_body, check_head)
SEEDS = {
    check_adapter_header: [
        b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        b"          \x00\x00\x00\x00"
    ],
    check_json_body: [
        b'{"adapter": "a/b@3", "inputs": ["to be", [1, 2]], "outputs": ["critic"], "layer": 2}',
        b'{"adapters": ["a"], "inputs": [1, 2], "normalize": false, "timeout_ms": 10}',
    ],
    check_head: [
        b"POST /encode HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /ready HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    ],
}
