"""HTTP over raw sockets: what is not plain HTTP/1.1 is refused or ignored, and never desynchronises."""

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from shutil import which

import pytest
from conftest import Served

BODY = b'{"adapter": "plain", "inputs": "to be"}'
SECOND = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
# A body that would be a request of its own, were it taken for one.
SMUGGLED = b"DELETE /adapters/plain HTTP/1.1\r\nhost: x\r\n\r\n"
OFFERS = {
    "h2c, as java.net.http": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
    b"http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n",
    "h2c, as curl": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    "websocket": b"connection: keep-alive, Upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n",
    "unknown": b"upgrade: TLS/1.3, IRC/6.9\r\nconnection: upgrade\r\n",
}
CHUNKED = b"7;x=y\r\n" + BODY[:7] + b"\r\n%x\r\n" % len(BODY[7:]) + BODY[7:] + b"\r\n0\r\nA: b\r\n\r\n"
BODIES = {
    "length": b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY),
    "chunked": b"transfer-encoding: chunked\r\n\r\n" + CHUNKED,
}


def address(served: Served) -> tuple[str, int]:
    host, port = served.url.removeprefix("http://").split(":")
    return host, int(port)


@contextmanager
def connected(served: Served) -> Iterator[socket.socket]:
    with socket.create_connection(address(served), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def sent(served: Served, *parts: bytes) -> bytes:
    """All that the server answers to the parts, each sent in a packet of its own."""
    with connected(served) as connection:
        for part in parts:
            connection.sendall(part)
        return read_all(connection)


def encode(offer: bytes = b"", body: bytes = BODIES["length"]) -> bytes:
    head = b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head + offer + body


def statuses(answers: bytes) -> list[int]:
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("offer", OFFERS)
def test_an_upgrade_offer_is_ignored_and_the_body_read(
    tiny_server: Served, offer: str, body: str
) -> None:
    request = encode(OFFERS[offer], BODIES[body])
    answers = sent(tiny_server, request + request + SECOND)  # pipelined, on a kept connection
    assert statuses(answers) == [200, 200, 200]
    assert answers.count(b'"embedding":[') == 2


@pytest.mark.parametrize("body", BODIES)
def test_an_upgrade_offer_is_ignored_wherever_the_request_is_split(
    tiny_server: Served, body: str
) -> None:
    """In two reads at every byte, and in three; each on a connection that is kept for a second."""
    request = encode(OFFERS["h2c, as curl"], BODIES[body])
    head = request.index(b"\r\n\r\n") + 4
    with connected(tiny_server) as connection:
        for cut in range(1, len(request) + 1):
            connection.sendall(request[:cut])
            # Packets that are sent at once may arrive in one read: wait for the first to be read.
            _wait_until_read(connection)
            connection.sendall(request[cut:])
            assert _answer(connection) == 200, request[cut - 9 : cut]
        for part in (request[:head], request[head : head + 3], request[head + 3 :]):
            connection.sendall(part)
            _wait_until_read(connection)
        assert _answer(connection) == 200


def _answer(connection: socket.socket) -> int:
    response = HTTPResponse(connection)
    response.begin()
    assert response.status != 200 or b'"embedding":[' in response.read()
    return response.status


def _wait_until_read(connection: socket.socket) -> None:
    """Until the server's kernel has acknowledged what was sent; on loopback its loop is woken."""
    import fcntl
    import struct
    import termios
    import time

    pending = struct.pack("i", 1)
    while struct.unpack("i", pending)[0]:
        pending = fcntl.ioctl(connection, termios.TIOCOUTQ, struct.pack("i", 0))
    time.sleep(0.0005)
