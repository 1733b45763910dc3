"""A server without file descriptors: nothing is marked damaged, nothing spins, and it recovers."""

import itertools
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from adapter_client import Adapters, adapters_of, assert_refused, wait_until
from conftest import start_server

from server.keys import new_key

FILES = 120
SCRIPT = Path(__file__).parent / "few_descriptors_server.py"


@pytest.fixture(scope="module")
def few(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapters]:
    """A server under `ulimit -n 120`, started anew by no test, with the adapter `cold`."""
    place = tmp_path_factory.mktemp("few")
    arguments = (tiny_backbone, "--data", place / "data", "--dtype", "float32", "--slots", "1")
    served = start_server(place / "log", *arguments, script=SCRIPT, FILES=str(FILES))
    try:
        with adapters_of(served, place / "data") as adapters:
            assert adapters.put("cold", adapters.file(7)).status_code == 201
            adapters.embeddings("plain")  # of one slot `cold` is not the holder
            yield adapters
    finally:
        served.stop()


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def many_connections(at: str, count: int) -> Iterator[list[socket.socket]]:
    url = urlsplit(at)
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((url.hostname, url.port), timeout=30))
            for _ in range(count)
        ]


@contextmanager
def out_of_descriptors(adapters: Adapters) -> Iterator[None]:
    """As where all are in use: no descriptor can be opened in the block unless one is closed."""
    pid = adapters.served.process.pid
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    free = next(number for number in itertools.count() if number not in used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, FILES))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (FILES, FILES))


def begin_body(connection: socket.socket, key: str) -> None:
    """Send a request's head, and nothing of its body."""
    head = f"POST /encode HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-length: 999\r\n"
    connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode())


def status_of(connection: socket.socket) -> int | None:
    """Of an answer that is there within a moment; None where there is none."""
    connection.settimeout(0.02)
    try:
        head = connection.recv(4096)
    except (TimeoutError, ConnectionError):
        return None
    return int(head.split()[1]) if head else None


def test_connections_are_bounded_and_files_are_served_meanwhile(few: Adapters) -> None:
    assert "connections at most: of the 120 file descriptors" in few.served.log.read_text()
    pid = few.served.process.pid
    with many_connections(few.served.url, 2 * FILES):
        wait_until(lambda: open_files(pid) < FILES - 10)
        assert len(few.embeddings("cold")) == 2  # a load opens the file and the registry
        assert few.client.post("/adapters/cold/verify").json()["sound"]
        assert few.put("cold", few.file(8)).status_code == 201
        for _ in range(3):  # idle connections make room for new ones
            with few.served.client() as new:
                assert new.get("/health").status_code == 200


def test_one_key_leaves_connections_to_others(tiny_backbone: Path, tmp_path: Path) -> None:
    """Requests that never end, on more connections than the server takes, are of one key."""
    keys = tmp_path / "keys.json"
    one, other = (new_key(keys, name, scopes=frozenset({"infer"}))[1] for name in ("one", "other"))
    arguments = (tiny_backbone, "--dtype", "float32", "--keys", keys)
    served = start_server(tmp_path / "log", *arguments, script=SCRIPT, FILES=str(FILES))
    try:
        with many_connections(served.url, 2 * FILES) as many:
            for connection in many:
                with suppress(ConnectionError):
                    begin_body(connection, one)
            assert 503 in [status_of(connection) for connection in many]
            for _ in range(3):
                with served.client() as new:
                    new.headers["x-api-key"] = other
                    assert new.get("/health").status_code == 200
                    assert new.post("/encode", json={"inputs": "abc"}).status_code == 200
    finally:
        served.stop()


def test_without_a_descriptor_loads_and_uploads_are_503_and_nothing_is_damaged(
    few: Adapters,
) -> None:
    answer = few.embeddings("cold")
    few.embeddings("plain")
    pid = few.served.process.pid
    with out_of_descriptors(few):
        body = {"adapter": "cold", "inputs": "abc"}
        for _ in range(3):
            refused = few.client.post("/encode", json=body)
            assert_refused(refused, 503, "overloaded")
            assert int(refused.headers["retry-after"]) > 0
        assert_refused(few.put("cold", few.file(9)), 503, "overloaded")
        assert_refused(few.client.get("/adapters/cold/file"), 503, "overloaded")
        verified = few.client.post("/adapters/cold/verify").json()
        assert "can't be read now" in verified["versions"]["1"]
        with many_connections(few.served.url, 5):  # none can be accepted: nor may the server spin
            before = processor_s(pid)
            for _ in range(20):
                assert few.client.get("/health").status_code == 200
            time.sleep(1.0)
            assert processor_s(pid) - before < 0.5
    few.client.get("/health")
    wait_until(lambda: few.client.post("/encode", json=body).status_code == 200)
    assert few.embeddings("cold") == answer
    assert few.client.post("/adapters/cold/verify").json()["sound"]
    assert not any(version["damaged"] for version in few.versions("cold"))
    assert few.put("cold", few.file(9)).status_code == 201
