"""A server's adapters seen from outside: uploads, raw requests, and what is stored."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from bad_files import set_bytes
from conftest import Served

OCTETS = {"content-type": "application/octet-stream"}
QUESTION = {"adapter": "plain", "inputs": ["to be", "or not to be"]}
MAX_ERROR_BYTES = 4096


@dataclass(frozen=True)
class Answer:
    """Of a raw request."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Adapters:
    """A server that serves `plain` of the tiny backbone, and its data folder."""

    served: Served
    client: httpx.Client
    data: Path
    digest: str  # the backbone's

    def file(self, seed: int, **options: Any) -> bytes:
        return set_bytes(self.digest, seed=seed, **options)

    def put(
        self, name: str, file: bytes, headers: dict[str, str] | None = None, **query: str
    ) -> httpx.Response:
        return self.client.put(
            f"/adapters/{name}", content=file, headers=OCTETS | (headers or {}), params=query
        )

    def versions(self, name: str) -> list[dict[str, Any]]:
        answer = self.client.get(f"/adapters/{name}")
        return answer.json()["versions"] if answer.status_code == 200 else []

    def embeddings(self, adapter: str | None = "plain") -> list[list[float]]:
        answer = self.client.post("/encode", json=QUESTION | {"adapter": adapter})
        assert answer.status_code == 200, answer.text
        return [row["embedding"] for row in answer.json()["data"]]

    def raw(self, *parts: bytes) -> Answer:
        """Send these bytes over a socket of their own, and read the first answer."""
        with self.connection() as connection:
            for part in parts:
                connection.sendall(part)
            return read_answer(connection)

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        url = urlsplit(self.served.url)
        with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
            yield connection

    @property
    def blobs(self) -> Path:
        (folder,) = self.data.glob("*/blobs")
        return folder

    def stored(self) -> dict[str, Any]:
        """Everything that a failed request must leave as it was."""
        listed = self.client.get("/adapters", params={"limit": "1000"}).json()["data"]
        info = self.client.get("/info").json()
        files = (path for path in self.blobs.rglob("*") if not path.is_dir())
        return {
            "files": sorted((str(f), f.lstat().st_size, f.lstat().st_mtime_ns) for f in files),
            "adapters": [
                {k: v for k, v in row.items() if k not in ("requests", "last_used")}
                for row in listed
            ],
            "audit": [self.client.get(f"/adapters/{r['name']}").json()["audit"] for r in listed],
            "count": info["adapters"],
            "slots": info["slots"],
        }

    def _settled(self) -> dict[str, Any]:
        """`stored`, once the loads into the slots that earlier uploads began have ended."""
        deadline, before = time.monotonic() + 10, self.stored()
        while time.monotonic() < deadline:
            time.sleep(0.05)
            now = self.stored()
            if now == before:
                break
            before = now
        return before

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What the block does changes nothing stored, and no answer."""
        answer, before = self.embeddings(), self._settled()
        yield
        assert self.stored() == before
        assert not any((self.blobs / "incoming").iterdir())
        assert self.embeddings() == answer


@contextmanager
def adapters_of(served: Served, data: Path) -> Iterator[Adapters]:
    with served.client() as client:
        info = client.get("/info").json()
        yield Adapters(served, client, data, info["backbone"]["digest"])


def read_answer(connection: socket.socket) -> Answer:
    response = HTTPResponse(connection)
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def assert_refused(
    answer: httpx.Response | Answer, status: int, code: str, reason: str | None = None
) -> None:
    body = answer.body if isinstance(answer, Answer) else answer.content
    assert len(body) <= MAX_ERROR_BYTES
    error = httpx.Response(200, content=body).json()["error"]
    sent = answer.status if isinstance(answer, Answer) else answer.status_code
    assert (sent, error["code"], error["details"].get("reason")) == (status, code, reason), error
    assert error["message"]
    assert error["request_id"]


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@contextmanager
def long_request(
    adapters: Adapters, name: str, rows: int = 1000
) -> Iterator[Future[httpx.Response]]:
    """A request that uses `name` from the block's beginning on; a batch a row keeps it there."""
    body = {"adapter": name, "inputs": [[5] * 60] * rows, "timeout_ms": 120_000}
    with adapters.served.client() as client, ThreadPoolExecutor(1) as threads:
        future = threads.submit(client.post, "/encode", json=body)
        wait_until(lambda: future.done() or in_flight(adapters, name) > 0)
        assert not future.done(), future.result().text
        yield future
        future.result()


def in_flight(adapters: Adapters, name: str) -> int:
    answer = adapters.client.get(f"/adapters/{name.partition('@')[0]}")
    return answer.json()["in_flight"] if answer.status_code == 200 else 0
