"""Two servers behind a balancer, restarted one after the other under traffic: nothing is dropped.

`make test` restarts each once; RESTARTS=100 says how many are wanted.
"""

import asyncio
import itertools
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from balancer import HOST, Balancer
from conftest import Served, start_server
from reference import Oracle

RESTARTS = int(os.environ.get("RESTARTS", "2"))
DRAIN_WINDOW_S = 2  # the balancer must know before it is over, however busy the machine is
CLIENTS = 2  # of each kind
PAUSE_S = 0.05  # of a client between two requests
ROWS = [[5, 6, 7], [9], [*range(1, 30)], [3] * 11]
ADAPTERS = ["base", "ckpt_a", "ckpt_b"]
TOLERANCE = 2e-4  # max abs, float32: the kit's own
KEPT = httpx.Limits(max_connections=1)
NEW = httpx.Limits(max_connections=1, max_keepalive_connections=0)  # one for each request

Reference = dict[tuple[str, int], np.ndarray]  # (C,) by adapter and number of the row


class Backend:
    """A port and a data folder, and the processes that had them; the last one has them now."""

    def __init__(self, backbone: Path, folder: Path, port: int) -> None:
        self.backbone, self.folder, self.port = backbone, folder, port
        self.served: list[Served] = []

    def start(self) -> None:
        served = start_server(
            self.folder / f"{self.port}-{len(self.served)}.log",
            self.backbone,
            *("--port", self.port, "--data", self.folder / f"{self.port}-data"),
            *("--drain-window-s", DRAIN_WINDOW_S, "--dtype", "float32", "--threads", 1),
        )
        self.served.append(served)

    def stop(self) -> int:
        """The exit status, after SIGTERM."""
        return self.served[-1].stop()

    def kill(self) -> None:
        for served in self.served:
            served.process.kill()
            served.process.wait()


@pytest.fixture
def backends(kit_backbone: Path, tmp_path: Path) -> Iterator[list[Backend]]:
    backends = [Backend(kit_backbone, tmp_path, port) for port in free_ports(2)]
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(Backend.start, backends))
        yield backends
    finally:
        for backend in backends:
            backend.kill()


def free_ports(count: int) -> list[int]:
    """Below those of outgoing connections: none takes one while its server is down."""
    ports = random.sample(range(20_000, 30_000), 1000)
    return list(itertools.islice(filter(is_free, ports), count))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


@pytest.fixture
def reference(kit_backbone: Path) -> Reference:
    oracle = Oracle(kit_backbone)
    return {
        (adapter, number): oracle.embedding(row, None if adapter == "base" else adapter).numpy()
        for adapter in ADAPTERS
        for number, row in enumerate(ROWS)
    }


class Traffic:
    """Clients that ask one row after the other, on kept connections and on new ones."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.requests = 0
        self.dropped: Counter[str] = Counter()  # by the reason
        self._ended = False

    @asynccontextmanager
    async def flowing(self, url: str) -> AsyncIterator[None]:
        """In the block; at its end every client gets its last answer."""
        async with asyncio.TaskGroup() as tasks:
            for seed, limits in enumerate([KEPT, NEW] * CLIENTS):
                tasks.create_task(self._ask_on(url, random.Random(seed), limits))
            try:
                yield
            finally:
                self._ended = True

    async def _ask_on(self, url: str, order: random.Random, limits: httpx.Limits) -> None:
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
            while not self._ended:
                self.requests += 1
                try:
                    await self._ask(client, *order.choice(list(self.reference)))
                except (httpx.HTTPError, AssertionError) as reason:
                    self.dropped[repr(reason)] += 1
                await asyncio.sleep(PAUSE_S)

    async def _ask(self, client: httpx.AsyncClient, adapter: str, number: int) -> None:
        body = {"adapter": adapter, "inputs": [ROWS[number]]}
        answer = await client.post("/encode", json=body)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        (row,) = answer.json()["data"]
        expected = self.reference[adapter, number]
        np.testing.assert_allclose(row["embedding"], expected, rtol=0, atol=TOLERANCE)


def test_rolling_restarts_drop_nothing(backends: list[Backend], reference: Reference) -> None:
    balancer = Balancer([backend.port for backend in backends])
    traffic = Traffic(reference)
    exits = asyncio.run(restart_in_turn(backends, balancer, traffic))
    print(f"{RESTARTS} restarts, {traffic.requests} requests, {traffic.dropped.total()} dropped")
    assert not traffic.dropped, traffic.dropped.most_common(9)
    assert exits == [0] * RESTARTS


async def restart_in_turn(
    backends: list[Backend], balancer: Balancer, traffic: Traffic
) -> list[int]:
    """The exit status of each process that was stopped."""
    exits = []
    async with balancer.listening() as url:
        await until(lambda: len(balancer.ready) == len(backends))
        async with traffic.flowing(url):
            for backend in itertools.islice(itertools.cycle(backends), RESTARTS):
                exits.append(await asyncio.to_thread(backend.stop))
                answers = balancer.answers[backend.port]
                await asyncio.to_thread(backend.start)
                await until(lambda b=backend, n=answers: balancer.answers[b.port] > n)
    return exits


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 -- a look from outside; no event tells of it
            await asyncio.sleep(0.05)
