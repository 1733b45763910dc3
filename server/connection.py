"""uvicorn's connection with the bounds that it lacks: header bytes, header time, one Host."""

import asyncio
import json
import re
import sys
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.corked import Corked
from server.errors import STATUS, RequestError, error_body
from server.half_close import HalfClose
from server.open_connections import OpenConnections
from server.parser import RequestParser

MAX_HEADER_BYTES = 64 << 10
READ_BYTES = 16 << 10  # at once; and all that is read of a request before its handler asks for more
BODY_READ_BYTES = 256 << 10  # at once, of a body that a handler has asked for
HEADER_TIMEOUT_S = 10.0
CLIENT = "trunkline.client"  # of a scope: its Client
# What frames a body (chunks' sizes and extensions, trailers) may have so many bytes, and beside
# them so many for each byte of the body: chunks of one byte are allowed.
MAX_FRAMING_BYTES, FRAMING_OF_A_BYTE = 64 << 10, 16
START_BYTES = 256  # of a head, kept to tell what it was meant to be
VERSIONS = ("1.0", "1.1")
TOO_MANY = "too many connections are open; reuse one, or try again later"
TOO_MANY_REQUESTS = "this key has requests on its share of the connections: await their answers"
NOT_HTTP = "this is not HTTP/1.1, or can be read in two ways"
_NO_VERSION = re.compile(rb"\s*[A-Z]+ [^ \r\n]*\r?\n")  # a request line of HTTP/0.9
_OTHER_PROTOCOL = re.compile(rb"\s*[A-Z]+ [^ \r\n]* (?!HTTP/)")  # RTSP and ICE, which llhttp reads
_LINE = re.compile(rb"[A-Z]+ /[!-~]* HTTP/1\.[01]\r\n")  # a request, whatever its method


@dataclass(frozen=True)
class Refusal:
    """An answer that needs no handler."""

    status: int
    headers: list[tuple[bytes, bytes]]  # without the body's length
    body: bytes
    last: bool = False  # the connection is to be closed after it


Refuse = Callable[[Scope, bytes], Refusal | None]  # of a request and its whole body


class Client:
    """A request's client: whether it sent its whole body, whether it is gone.

    `left` is called once if it goes before it has its answer.
    """

    def __init__(self) -> None:
        self.sent_all = self.gone = False
        self.cycle: Any = None  # uvicorn's, of this request
        self.left: Callable[[], object] | None = None

    def leave(self) -> None:
        self.gone = True
        if self.left is not None:
            self.left()


class Connection(HttpToolsProtocol):
    """A head over 64 KiB is 431, one that dribbles 408, one without its Host 400; then closed.

    A request that came whole in one read is shown to `shed` before the application: what it
    refuses gets no task.
    """

    header_timeout_s = HEADER_TIMEOUT_S

    def __init__(
        self,
        *options: Any,
        shed: Refuse | None = None,
        bound: OpenConnections | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*options, **more)
        self._bound = bound
        self._requests = RequestParser(self)
        self.parser = self._requests  # type: ignore[assignment]
        self._shed = shed
        self._reading = False
        self._to_begin: tuple[Any, Any] | None = None  # a cycle and its app, of this read

    def connection_made(self, transport: Any) -> None:
        corked = Corked(transport, self.loop)
        super().connection_made(corked)  # type: ignore[arg-type]
        self._start = b""
        self._head_bytes = 0  # of a head that is not whole yet
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_fields = False  # between a request's line and the end of its head
        self._framing_left = 0  # bytes, of the body that is being read
        self._client = Client()  # of the request that is being read
        self._clients: deque[Client] = deque()  # of those that are not answered
        self._writes = corked.writes
        self._half_close = HalfClose(self.transport, self.loop, self._may_probe)
        self._await_head()
        if self._bound is not None and not self._bound.enter(self):
            self._refuse("overloaded", TOO_MANY)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._bound is not None:
            self._bound.leave(self)
        self._head_is_there()
        self._writes.stop()
        self._half_close.stop()
        super().connection_lost(exc)
        for client in self._clients:
            client.leave()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: what it sent whole is answered, then the connection closes.

        Returns whether it stays open for that; asyncio closes it at once otherwise.
        """
        self._head_is_there()
        if self._clients and not self._client.sent_all:
            self._drop_unfinished()
        if not self._clients or self.transport.is_closing():
            return False
        self._clients[-1].cycle.keep_alive = False
        self._half_close.begin()
        return True

    def _drop_unfinished(self) -> None:
        """The request that is being read, whose rest will never come; it is the last of them."""
        client = self._clients.pop()
        client.cycle.disconnected = True
        client.cycle.message_event.set()
        client.leave()
        if self._clients:  # it waits behind another
            self.pipeline.popleft()

    def _may_probe(self) -> bool:
        """Whether an interim answer may be written: HTTP/1.0 has none, nor may it split another."""
        cycle = self._clients[0].cycle if self._clients else None
        return (
            cycle is not None
            and not cycle.response_started
            and cycle.scope["http_version"] == "1.1"
            and not self.transport.is_closing()
        )

    @property
    def in_body(self) -> bool:
        """Whether a handler has asked for more of the body that is being read."""
        return self.cycle is not None and self.cycle.more_body

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._head_is_late)

    def _head_is_there(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._refuse("receive_timeout", f"the head took over {self.header_timeout_s:g} s")
        elif not self.transport.is_closing():  # it never asked for anything
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._in_head = not self.in_body
        if self._in_head:
            start = self._start if self._head_bytes else b""
            self._start = (start + data[:START_BYTES])[:START_BYTES]
            self._head_bytes += len(data)
        began_in_head, before = self._in_head, self._client
        self._reading = True
        super().data_received(data)
        self._reading = False
        # The rest of one body, read with the head of the next request, is no framing of the next.
        if not began_in_head and self.in_body and self._client is before:
            self._count_framing(len(data))
        self._begin()
        if self.transport.is_closing():
            return
        if began_in_head and self.in_body:
            self.flow.pause_reading()  # whoever is refused by the head sends no more of the body
        if not self._in_head:
            return
        if _NO_VERSION.match(self._start):
            self._refuse("malformed_request", NOT_HTTP)  # HTTP/0.9, which sends no more
        elif self._head_bytes > MAX_HEADER_BYTES:
            self._refuse("headers_too_large", f"the head may have {MAX_HEADER_BYTES} bytes")
        elif self._head_bytes:
            self._await_head()

    def _count_framing(self, size: int) -> None:
        """Counts the framing bytes of a read without a head: all that is not body."""
        self._framing_left -= size
        if self._framing_left < 0:
            sentence = f"a body's chunks and trailers may have {MAX_FRAMING_BYTES} bytes beside it"
            self._refuse("headers_too_large", sentence)

    def on_message_begin(self) -> None:
        self._in_fields = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A trailer is dropped (RFC 9110, 6.5.1): by then the head has been judged."""
        if self._in_fields:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._framing_left += (1 + FRAMING_OF_A_BYTE) * len(body)
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._in_fields, self._framing_left = False, MAX_FRAMING_BYTES
        self._head_is_there()
        self._check_protocol()
        hosts, size = 0, len(self.url)
        for name, value in self.headers:
            hosts += name == b"host"
            size += len(name) + len(value) + 4
        if hosts != 1 and (hosts or self.parser.get_http_version() == "1.1"):
            raise BadHead("malformed_request", "a request has one Host header")
        if size > MAX_HEADER_BYTES:
            raise BadHead("headers_too_large", f"the head may have {MAX_HEADER_BYTES} bytes")
        if not self._clients and self._bound and not self._bound.begin(self, self.headers):
            raise BadHead("overloaded", TOO_MANY_REQUESTS)
        self._client = Client()
        self._clients.append(self._client)
        self.scope[CLIENT] = self._client  # type: ignore[literal-required]
        super().on_headers_complete()
        self._client.cycle = self.cycle

    def _check_protocol(self) -> None:
        """Raises BadHead for what is not HTTP/1.0 or 1.1, or frames its body in another way."""
        version = self.parser.get_http_version()
        if version not in VERSIONS or _OTHER_PROTOCOL.match(self._start):
            raise BadHead("malformed_request", NOT_HTTP)
        if self.parser.get_method() == b"CONNECT":
            raise BadHead("method_not_allowed", "this server is no proxy")
        for name, value in self.headers:
            if name == b"transfer-encoding" and (version, value.lower()) != ("1.1", b"chunked"):
                sentence = "a Transfer-Encoding other than chunked, or in HTTP/1.0, is not read"
                raise BadHead("malformed_request", sentence)
            if name == b"te" and b"chunked" in value.lower():
                raise BadHead("malformed_request", "TE may not name chunked (RFC 9110, 10.1.4)")

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Not in the midst of a read, which may hold the request's body too."""
        if self._reading:
            self._to_begin = cycle, app
        else:
            super()._start_asgi_task(cycle, app)

    def _begin(self) -> None:
        if self._to_begin is None:
            return
        (cycle, app), self._to_begin = self._to_begin, None
        if not self._refused_whole(cycle):
            super()._start_asgi_task(cycle, app)

    def _refused_whole(self, cycle: Any) -> bool:
        """Whether `shed` has refused it; it is answered then."""
        if self._shed is None or cycle.more_body or cycle.disconnected or self.flow.write_paused:
            return False
        refusal = self._shed(cycle.scope, bytes(cycle.body))
        if refusal is None:
            return False
        cycle.response_started = cycle.response_complete = True
        self._answer(refusal, keep=cycle.keep_alive and not refusal.last)
        cycle.on_response()
        return True

    def on_message_complete(self) -> None:
        if self._requests.at_upgrade:
            return  # the body, if there is one, comes next
        self._client.sent_all = True
        super().on_message_complete()
        if len(self._clients) == 1:  # else it waits behind another, and no more is read
            self.flow.resume_reading()  # to see the client leave; a large body had paused it

    def on_response_complete(self) -> None:
        self._clients.popleft()
        if self._bound is not None and not self._clients:
            self._bound.end(self)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Called where the parser, or a callback of ours, found a fault: the context says which."""
        error = _fault()
        if isinstance(error, BadHead):
            self._refuse(error.code, error.sentence)
        elif isinstance(error, httptools.HttpParserInvalidMethodError) and _LINE.match(self._start):
            self._refuse("method_not_allowed", "the method is unknown")
        else:
            self._refuse("malformed_request", NOT_HTTP)

    def _refuse(self, code: str, sentence: str) -> None:
        self._head_is_there()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:  # a second answer can't be told from the first
                self.transport.close()
                return
            self.cycle.disconnected = True  # this is its answer
            self.cycle.message_event.set()
        request_id = uuid.uuid4().hex
        body = json.dumps(error_body(RequestError(code, sentence), request_id)).encode()
        headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
        if code == "overloaded":
            headers.append((b"retry-after", b"1"))
        if code == "method_not_allowed":
            headers.append((b"allow", b"GET, HEAD, POST, PUT, DELETE"))
        self._answer(Refusal(STATUS[code], headers, body), keep=False)

    def _answer(self, refusal: Refusal, keep: bool) -> None:
        """Without a task; the connection is closed after it unless it is to `keep`."""
        headers = [*refusal.headers, (b"content-length", b"%d" % len(refusal.body))]
        if not keep:
            headers.append((b"connection", b"close"))
        lines = b"".join([b"%s: %s\r\n" % header for header in headers])
        self.transport.write(STATUS_LINE[refusal.status] + lines + b"\r\n" + refusal.body)
        if not keep:
            self.transport.close()


class BoundedReads(asyncio.BufferedProtocol):
    """A Connection that is given READ_BYTES at once, and more of a body that is asked for."""

    # Of all connections: it is filled and emptied in one turn of the event loop.
    _buffer = memoryview(bytearray(BODY_READ_BYTES))

    def __init__(self, **options: Any) -> None:
        self.connection = Connection(**options)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer if self.connection.in_body else self._buffer[:READ_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        self.connection.data_received(bytes(self._buffer[:nbytes]))

    def connection_made(self, transport: Any) -> None:
        self.connection.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection.connection_lost(exc)

    def eof_received(self) -> bool:
        return self.connection.eof_received()

    def pause_writing(self) -> None:
        self.connection.pause_writing()

    def resume_writing(self) -> None:
        self.connection.resume_writing()


def _fault() -> BaseException | None:
    """What the parser raised; of a callback's exception, the exception itself."""
    error = sys.exc_info()[1]
    inner = error.__context__ if error is not None else None
    return inner if isinstance(inner, BadHead) else error


class BadHead(Exception):
    """Raised through the parser, which stops there."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code, self.sentence = code, sentence
