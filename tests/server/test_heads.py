"""Heads of requests over raw sockets: each gets its code, and the connection is closed."""

import json
import socket

import httpx
import pytest
from conftest import Served

GET = b"GET /health HTTP/1.1\r\n"


def talk(served: Served, *parts: bytes) -> tuple[int, dict]:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        received = b""
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:
            pass  # it was refused before all was sent
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert len(body) <= 4096
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (GET + b"\r\n", 400, "malformed_request"),
        (GET + b"host: a\r\nhost: b\r\n\r\n", 400, "malformed_request"),
        (b"nonsense\r\n\r\n", 400, "malformed_request"),
        (b"FOO / HTTP/1.1\r\nhost: a\r\n\r\n", 405, "method_not_allowed"),
        (GET + b"host: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (GET + b"host: a\r\n" + b"x: yyyy\r\n" * 9_000, 431, "headers_too_large"),
        (GET + b"host: a\r\nx: " + b"y" * 70_000, 431, "headers_too_large"),
    ],
    ids=["no Host", "two Hosts", "no HTTP", "method", "one long", "many", "endless"],
)
def test_a_wrong_head_gets_its_code_in_the_one_shape_and_is_closed(
    tiny_server: Served, head: bytes, status: int, code: str
) -> None:
    got, body = talk(tiny_server, head)
    assert (got, body["error"]["code"]) == (status, code)
    assert body["error"]["request_id"]
    with tiny_server.client() as client:
        assert client.get("/health").status_code == 200


def test_a_head_that_dribbles_is_408_and_an_idle_connection_costs_nobody_else(
    tiny_server: Served,
) -> None:
    host, port = tiny_server.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=30) for _ in range(400)]
    try:
        with tiny_server.client() as client:
            assert client.get("/health").status_code == 200
            assert client.post("/encode", json={"inputs": "abc"}).status_code == 200
        status, body = talk(tiny_server, GET, b"host: ")
        assert (status, body["error"]["code"]) == (408, "receive_timeout")
        assert idle[0].recv(10) == b""  # it never asked, and was closed
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_balancers_may_ask_by_head(tiny_server: Served, path: str) -> None:
    with tiny_server.client() as client:
        answer = client.head(path)
        assert answer.status_code == 200
        assert answer.content == b""


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/health", {"GET", "HEAD"}),
        ("GET", "/encode", {"POST"}),
        ("POST", "/adapters/a", {"GET", "PUT", "DELETE"}),
    ],
)
def test_405_names_the_methods_that_there_are(
    tiny_server: Served, method: str, path: str, allowed: set[str]
) -> None:
    answer = httpx.request(method, f"{tiny_server.url}{path}")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) >= allowed
