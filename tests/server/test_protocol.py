"""HTTP over raw sockets: what is not plain HTTP/1.1 is refused or ignored, without a desync."""

import asyncio
import json
import re
import socket
import subprocess
import sys
from asyncio import Runner
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from shutil import which

import pytest
import uvloop
from conftest import Served
from fuzz_targets import Wire
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from server.connection import CLIENT, BoundedReads, Connection
from server.half_close import PROBE

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
CHUNKED = (
    b"7;x=y\r\n" + BODY[:7] + b"\r\n%x\r\n" % len(BODY[7:]) + BODY[7:] + b"\r\n0\r\nA: b\r\n\r\n"
)
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


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the request's method, path and body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    text = f"<{scope['method']} {scope['path']} {body.decode()}>".encode()
    headers = [(b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


async def _echoed(*parts: bytes) -> list[bytes]:
    """What the echo answers to these reads of a connection."""
    config = Config(_echo, http=Connection, log_config=None, access_log=False, ws="none")
    config.load()
    config.loaded_app = _echo
    wire = Wire()
    connection = Connection(config, ServerState(), {}, asyncio.get_running_loop())
    connection.connection_made(wire)
    for part in parts:
        if not wire.closed:
            connection.data_received(part)
        for _ in range(4):
            await asyncio.sleep(0)
    while not wire.closed and connection._clients:  # noqa: ASYNC110 -- uvicorn has no event
        await asyncio.sleep(0)
    connection.connection_lost(None)
    return re.findall(rb"<(.*?)>", bytes(wire.sent), re.DOTALL)


@pytest.mark.parametrize("body", BODIES)
def test_an_upgrade_offer_is_ignored_wherever_the_requests_are_split(body: str) -> None:
    """Three of them in two reads at every byte, and in reads of every size."""
    offers = (OFFERS["h2c, as curl"], OFFERS["websocket"], b"expect: 100-continue\r\n")
    requests = [encode(offer, BODIES[body]) for offer in offers]
    whole = b"".join(requests) + encode(offers[0], b"\r\n")  # the last without a body
    expected = [b"POST /encode " + BODY] * 3 + [b"POST /encode "]

    async def all_splits() -> None:
        for cut in range(1, len(whole)):
            assert await _echoed(whole[:cut], whole[cut:]) == expected, whole[cut - 9 : cut]
        for size in range(1, 40):
            parts = [whole[at : at + size] for at in range(0, len(whole), size)]
            assert await _echoed(*parts) == expected, size

    asyncio.run(all_splits())


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_behind_an_upgrade_offer_never_runs_as_a_request(
    tiny_server: Served, framing: str
) -> None:
    body = BODIES[framing].replace(BODY, SMUGGLED)
    if framing == "length":
        body = b"content-length: %d\r\n\r\n%s" % (len(SMUGGLED), SMUGGLED)
    else:
        chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
        body = b"transfer-encoding: chunked\r\n\r\n" + chunk
    for offer in OFFERS.values():
        request = encode(offer, body)
        head = len(request) - len(body) + body.index(b"\r\n\r\n") + 4
        for parts in ((request, SECOND), (request[:head], request[head:], SECOND)):
            assert statuses(sent(tiny_server, *parts)) == [400, 200]  # malformed_json
    with tiny_server.client() as client:
        assert client.get("/adapters/plain").status_code == 200


def test_connect_is_refused_and_the_connection_closed(tiny_server: Served) -> None:
    request = b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n"
    assert statuses(sent(tiny_server, request + SECOND)) == [405]


NO_HTTP_1 = {
    "HTTP/0.9": b"GET /health\r\n",
    "HTTP/0.9 with an empty line": b"GET /health\r\n\r\n",
    "HTTP/0.9 of a version": b"GET /health HTTP/0.9\r\nhost: x\r\n\r\n",
    "HTTP/2.0": b"GET /health HTTP/2.0\r\nhost: x\r\n\r\n",
    "HTTP/2": b"GET /health HTTP/2\r\nhost: x\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": b"GET /health HTTP/1.2\r\nhost: x\r\n\r\n",
    "HTTP/9.9": b"GET /health HTTP/9.9\r\nhost: x\r\n\r\n",
    "HTTP/1.10": b"GET /health HTTP/1.10\r\nhost: x\r\n\r\n",
    "HTTP/01.1": b"GET /health HTTP/01.1\r\nhost: x\r\n\r\n",
    "lower case": b"GET /health http/1.1\r\nhost: x\r\n\r\n",
    "RTSP": b"GET /health RTSP/1.0\r\nhost: x\r\n\r\n",
    "ICE": b"SOURCE /health ICE/1.0\r\nhost: x\r\n\r\n",
    "two spaces": b"GET  /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n",
    **{
        f"{name}: {value}": encode(
            f"{name}: {value}\r\n".encode(), BODIES["chunked"].partition(b"\r\n")[2]
        )
        for name, value in (
            ("transfer-encoding", "gzip, chunked"),
            ("transfer-encoding", "chunked, gzip"),
            ("transfer-encoding", "chunked, chunked"),
            ("transfer-encoding", "gzip"),
            ("transfer-encoding", "identity"),
            ("transfer-encoding", "chunked;q=1"),
            ("transfer-encoding", "xchunked"),
            ("transfer-encoding", ""),
            ("transfer-encoding", "gzip\r\ntransfer-encoding: chunked"),
            ("transfer-encoding", "chunked\r\ntransfer-encoding: chunked"),
            ("transfer-encoding", "chunked\r\ncontent-length: 5"),
            ("te", "gzip, chunked\r\ntransfer-encoding: chunked"),
        )
    },
    "Transfer-Encoding in HTTP/1.0": encode(b"", BODIES["chunked"]).replace(b"/1.1", b"/1.0", 1),
}


@pytest.mark.parametrize("case", NO_HTTP_1)
def test_what_is_not_plain_http_1_is_refused_and_closed(tiny_server: Served, case: str) -> None:
    request = NO_HTTP_1[case]
    middle = request.index(b"\r\n") - 4
    for parts in ((request,), (request + SECOND,), (request[:middle], request[middle:])):
        answer = sent(tiny_server, *parts)
        assert statuses(answer) == [400], answer
        assert b"\r\nconnection: close\r\n" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_request"


@pytest.mark.parametrize("te", ["trailers", "deflate, gzip;q=0.3", ""])
def test_te_as_clients_send_it_is_ignored(tiny_server: Served, te: str) -> None:
    request = encode(f"connection: TE, close\r\nte: {te}\r\n".encode())
    assert statuses(sent(tiny_server, request)) == [200]


def test_a_request_line_longer_than_a_read_is_one_of_http(tiny_server: Served) -> None:
    """Also where its packets end within its version, or at a word that looks like another."""
    path = b"/health?" + b"a" * 400
    request = b"GET %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path
    for cut in (256, 300, len(path) + 7, len(path) + 16, len(path) + 20):
        assert statuses(sent(tiny_server, request[:cut], request[cut:])) == [200]


def test_the_stock_java_client_gets_its_answers(tiny_server: Served) -> None:
    """With a body of known length and with a stream of unknown length, twice on its connection."""
    if which("java") is None:
        pytest.skip("there is no java")
    program = ["java", "-XX:TieredStopAtLevel=1", Path(__file__).parent / "StockClient.java"]
    command = [*program, f"{tiny_server.url}/encode", BODY.decode()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "release version" in done.stderr or "compiler" in done.stderr:
        pytest.skip(f"this java runs no source files: {done.stderr.splitlines()[0]}")
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert all(line.startswith("200 HTTP_1_1 ") and '"embedding":[' in line for line in lines)


@pytest.mark.parametrize("body", [BODY.decode(), "@-"])
def test_curl_with_http2_gets_its_answer(tiny_server: Served, body: str) -> None:
    if which("curl") is None:
        pytest.skip("there is no curl")
    command = ["curl", "-sS", "--http2", "-w", "\n%{http_code}", "-d", body]
    command += ["-H", "content-type: application/json"]
    if body == "@-":
        command += ["-H", "transfer-encoding: chunked"]
    url = f"{tiny_server.url}/encode"
    done = subprocess.run([*command, url, url], input=BODY, capture_output=True, check=False)
    if b"HTTP/2" in done.stderr:
        pytest.skip("this curl has no HTTP/2")
    assert done.stdout.count(b"\n200") == 2, done
    assert done.stdout.count(b'"embedding":[') == 2


HALF_CLOSED = {
    "one": (encode(),),
    "pipelined": (encode() + encode(OFFERS["h2c, as curl"], BODIES["chunked"]) + encode(),),
    "in two packets": (encode()[:90], encode()[90:]),
    "before the next head is whole": (encode() + b"GET /hea",),
}


@pytest.mark.parametrize("case", HALF_CLOSED)
def test_a_client_that_half_closes_gets_its_answers(tiny_server: Served, case: str) -> None:
    requests = b"".join(HALF_CLOSED[case]).count(b"POST ")
    with connected(tiny_server) as connection:
        for part in HALF_CLOSED[case]:
            connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        answers = read_all(connection)
    assert statuses(answers) == [200] * requests
    assert answers.count(b"connection: close") == 1
    assert answers.count(b'"embedding":[') == requests


@pytest.mark.parametrize("cut", [10, 90, -1])
def test_a_request_cut_off_by_a_half_close_is_closed_unanswered(
    tiny_server: Served, cut: int
) -> None:
    with connected(tiny_server) as connection:
        connection.sendall(encode() + encode()[:cut])
        connection.shutdown(socket.SHUT_WR)
        assert statuses(read_all(connection)) == [200]
    with connected(tiny_server) as connection:
        connection.sendall(encode()[:cut])
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b""


class Waiting:
    """A connection of ours whose answer is held back, with a client of raw sockets."""

    def __init__(self) -> None:
        self.left, self.release = asyncio.Event(), asyncio.Event()

    async def __aenter__(self) -> "Waiting":
        return self

    async def __aexit__(self, *_: object) -> None:
        """With everything closed: uvloop waits for ever for what is open when it closes."""
        self.release.set()
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        while self.connections:  # noqa: ASYNC110 -- uvicorn's own sets
            await asyncio.sleep(0.001)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[CLIENT].left = self.left.set
        await self.release.wait()
        await _echo(scope, receive, send)

    async def connect(self) -> socket.socket:
        """The client, whose request was received."""
        config = Config(self.app, log_config=None, access_log=False, ws="none")
        config.load()
        config.loaded_app = self.app
        state, loop = ServerState(), asyncio.get_running_loop()
        self.connections = state.connections
        made = partial(BoundedReads, config=config, server_state=state, app_state={}, _loop=loop)
        listener, client = socket.socket(), socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        self.server = await loop.create_server(made, sock=listener)
        client.connect(listener.getsockname())
        client.setblocking(False)
        client.send(encode(body=b"content-length: 5\r\n\r\nabcde"))
        while not state.tasks:  # noqa: ASYNC110 -- uvicorn's own sets
            await asyncio.sleep(0.001)
        return client


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS)
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    monkeypatch.setattr("server.half_close.FIRST_PROBE_S", 0.01)
    monkeypatch.setattr("server.half_close.LOOK_S", 0.01)
    with Runner(loop_factory=LOOPS[request.param]) as runner:
        yield runner


def test_a_half_closed_client_is_probed_while_it_waits_and_answered(runner: Runner) -> None:
    async def talk() -> None:
        async with Waiting() as waiting:
            await converse(waiting, await waiting.connect())

    async def converse(waiting: Waiting, client: socket.socket) -> None:
        client.shutdown(socket.SHUT_WR)
        loop, received = asyncio.get_running_loop(), b""
        async with asyncio.timeout(20):
            while received.count(PROBE) < 3:
                received += await loop.sock_recv(client, 65536)
            waiting.release.set()
            while part := await loop.sock_recv(client, 65536):
                received += part
        assert received.endswith(b"<POST /encode abcde>")
        assert received.count(b"HTTP/1.1 200") == 1
        assert not waiting.left.is_set()
        client.close()

    runner.run(talk())


def test_a_client_that_is_gone_while_it_waits_is_noticed_by_the_probe(runner: Runner) -> None:
    async def talk() -> None:
        async with Waiting() as waiting:
            await converse(waiting, await waiting.connect())

    async def converse(waiting: Waiting, client: socket.socket) -> None:
        client.close()  # its FIN is that of a half-close
        async with asyncio.timeout(20):
            await waiting.left.wait()
        waiting.release.set()

    runner.run(talk())


@pytest.mark.parametrize("size", [50_000, 16_000_000], ids=["few bytes left", "many bytes left"])
@pytest.mark.parametrize("half_closed", [False, True])
def test_a_client_that_never_reads_does_not_hold_its_connection(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, size: int, half_closed: bool
) -> None:
    async def talk() -> None:
        async with Waiting() as waiting:
            await converse(waiting, await waiting.connect())

    async def converse(waiting: Waiting, client: socket.socket) -> None:
        if half_closed:
            client.shutdown(socket.SHUT_WR)
        waiting.release.set()
        async with asyncio.timeout(20):
            while waiting.connections:  # noqa: ASYNC110 -- uvicorn's own sets
                await asyncio.sleep(0.01)
        client.close()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * size})

    monkeypatch.setattr("server.write_timeout.WriteTimeout.seconds", 0.05)
    monkeypatch.setattr(sys.modules[__name__], "_echo", large)
    runner.run(talk())


TRAILERS = {
    "one": b"x-api-key: y\r\n",
    "a second host": b"host: y\r\n",
    "two": b"a: b\r\nx-forwarded-for: 1.2.3.4\r\n",
}


@pytest.mark.parametrize("case", TRAILERS)
def test_trailers_are_no_headers(case: str) -> None:
    async def names(scope: Scope, receive: Receive, send: Send) -> None:
        told.append([name for name, _ in scope["headers"]])
        await answer(scope, receive, send)

    told, answer = [], _echo
    whole = b"transfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n" + TRAILERS[case] + b"\r\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "_echo", names)
        answers = asyncio.run(_echoed(encode(body=whole) + SECOND))
    assert answers == [b"POST /encode abcde", b"GET /health "]
    assert told[0] == [b"host", b"content-type", b"transfer-encoding"]


# What frames a body and is no body: without end, it would be kept or read for ever.
FRAMINGS = {
    "many trailers": (b"0\r\n", b"a: b\r\n"),
    "a long trailer": (b"0\r\na: ", b"b"),
    "a long name": (b"0\r\n", b"b"),
    "an extension": (b"1;a=", b"b"),
    "small chunks with extensions": (b"", b"1;" + b"a" * 200 + b"\r\nx\r\n"),
}


@pytest.mark.parametrize("case", FRAMINGS)
def test_what_frames_a_body_has_a_bound(tiny_server: Served, case: str) -> None:
    first, then = FRAMINGS[case]
    part = then * (50_000 // len(then))
    with connected(tiny_server) as connection:
        connection.sendall(encode(body=b"transfer-encoding: chunked\r\n\r\n" + first))
        with suppress(ConnectionError):  # it is closed before all is sent
            for _ in range(20):
                connection.sendall(part)
        with suppress(ConnectionError):
            assert statuses(read_all(connection)) in ([431], [])


def test_the_rest_of_a_body_is_no_framing_of_the_next_request_in_the_same_read() -> None:
    large = b"x" * 200_000
    first = encode(body=b"content-length: %d\r\n\r\n" % len(large))
    whole = encode()
    half = len(whole) - len(BODY) // 2
    answers = asyncio.run(_echoed(first, large + whole[:half], whole[half:] + SECOND))
    assert answers == [b"POST /encode " + large, b"POST /encode " + BODY, b"GET /health "]


def test_a_body_in_chunks_of_one_byte_is_read(tiny_server: Served) -> None:
    text = b'{"adapter": "plain", "inputs": "to be"%s}' % (b" " * 20_000)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in text) + b"0\r\n\r\n"
    answers = sent(tiny_server, encode(body=b"transfer-encoding: chunked\r\n\r\n" + chunks), SECOND)
    assert statuses(answers) == [200, 200]


def test_a_length_may_begin_with_any_number_of_zeros(tiny_server: Served) -> None:
    length = b"content-length: %s%d\r\n\r\n" % (b"0" * 5000, len(BODY))
    assert statuses(sent(tiny_server, encode(body=length + BODY), SECOND)) == [200, 200]
