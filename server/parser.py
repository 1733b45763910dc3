"""httptools' request parser without protocol upgrades: an offer of one is ignored (RFC 9110, 7.8).

llhttp, which httptools wraps, stops after a head that offers an upgrade and forgets the body that
the head announces; what follows would be parsed as the next request. Every stock Java HttpClient
offers `h2c` with its first request, as does `curl --http2`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import httptools

# What decides where a message ends, and whether its connection is kept.
FRAMING = {b"content-length", b"transfer-encoding"}


class Callbacks(Protocol):
    """What a parser calls."""

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """The headers of the head that was read last."""

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


class RequestParser:
    """As httptools.HttpRequestParser, but every body is read as its head frames it.

    Where the parser stops for an upgrade, a fresh one takes its place: it is fed a head with the
    same framing and without the offer, whose callbacks are dropped, and then what follows the head.
    The parser that decides where the body ends is thus the same program with the same headers.
    """

    def __init__(self, callbacks: Callbacks) -> None:
        self._callbacks = callbacks
        self._use(callbacks)

    def _use(self, callbacks: Any) -> None:
        parser = httptools.HttpRequestParser(callbacks)
        # As uvicorn sets it: a client that pipelines is answered although its first request says
        # `connection: close`.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._parser = parser
        self.get_http_version = parser.get_http_version
        self.get_method = parser.get_method
        self.should_keep_alive = parser.should_keep_alive

    def should_upgrade(self) -> bool:
        return False

    @property
    def at_upgrade(self) -> bool:
        """Whether the head being read offers an upgrade, so that its parser will stop after it."""
        offers: bool = self._parser.should_upgrade()
        return offers

    def feed_data(self, data: bytes) -> None:
        """Raises httptools.HttpParserError."""
        rest: bytes | memoryview = data
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as stop:
                rest = memoryview(rest)[stop.args[0] :]
                self._begin_after_head()
            if not rest:
                return

    def _begin_after_head(self) -> None:
        version, kept = self.get_http_version(), self.should_keep_alive()
        head = [f"{self.get_method().decode()} / HTTP/{version}\r\n".encode()]
        head += [b"%s: %s\r\n" % field for field in self._callbacks.headers if field[0] in FRAMING]
        head.append(b"connection: %s\r\n\r\n" % (b"keep-alive" if kept else b"close"))
        self._use(_AfterHead(self._callbacks))
        self._parser.feed_data(b"".join(head))


class _AfterHead:
    """Callbacks from the end of a parser's first head on."""

    def __init__(self, callbacks: Callbacks) -> None:
        self._callbacks = callbacks
        self._in_first_head = True
        self.on_body = callbacks.on_body
        self.on_message_complete = callbacks.on_message_complete

    def on_message_begin(self) -> None:
        if not self._in_first_head:
            self._callbacks.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._in_first_head:
            self._callbacks.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_first_head:
            self._callbacks.on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._in_first_head:
            self._callbacks.on_headers_complete()
        self._in_first_head = False
