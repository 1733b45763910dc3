"""Adapters swapped under traffic: every answer is the reference of the digest that it names."""

import itertools
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from conftest import TINY, Serve, Served, random_adapter

from adapters.format import AdapterSet, adapter_bytes, parse_adapter
from adapters.weights import weights_of
from model.checkpoint import Backbone, read_backbone
from model.encoder import FINAL, Encoder
from model.heads import pool
from model.lora import LoraBatch
from model.packed import PackedBatch

SWAPS = int(os.environ.get("SWAPS", "300"))  # `make soak` does 1,000 and more
NAMES = [f"tenant-{i % 5}/task-{i}" for i in range(50)]
FILES = 30
SLOTS = 8
TOLERANCE = 1e-5  # max abs of unit vectors, float32
INPUTS = [[5, 6, 7], list(range(1, 40)), [9], list(range(20, 52)), [3] * 11]


class Reference:
    """What each file must give for each of INPUTS, by the file's digest; None is the base."""

    def __init__(self, backbone: Backbone) -> None:
        self.encoder = Encoder(TINY, backbone.tensors)
        self.files = [self._file(seed, backbone.digest) for seed in range(FILES)]
        sets = [parse_adapter(bytearray(data)) for data in self.files]
        self.vectors = {each.digest: self._vectors(each) for each in sets}
        self.vectors[None] = self._vectors(None)

    def _file(self, seed: int, digest: str) -> bytes:
        rank = 1 + seed % 7
        tensors = random_adapter(TINY, 100 + seed, ranks=rank, norms=seed % 3 == 0)
        return adapter_bytes(tensors, {"lora_alpha": "8.0", "base_digest": digest})

    def _vectors(self, adapter: AdapterSet | None) -> np.ndarray:
        weights = adapter and weights_of(adapter, TINY, torch.float32, lambda t, d: t.to(d))
        batch = PackedBatch(torch.tensor(list(itertools.chain(*INPUTS))), [*map(len, INPUTS)])
        lora = LoraBatch.of_rows(batch.lengths, [weights] * len(INPUTS))
        hidden = self.encoder.forward(batch, lora)[FINAL]
        rows = pool(hidden, batch, range(len(INPUTS)), "mean")
        return torch.nn.functional.normalize(rows).numpy()


@pytest.fixture(scope="module")
def reference(tiny_backbone: Path) -> Reference:
    return Reference(read_backbone(tiny_backbone))


@pytest.fixture
def server(tiny_backbone: Path, serve: Serve) -> Served:
    """Few slots, so that loads and evictions go on all the time; freed slots turn to NaN."""
    return serve(
        tiny_backbone, "--dtype", "float32", "--slots", str(SLOTS), "--debug-slots", "true"
    )


def put(client: httpx.Client, name: str, data: bytes, **headers: str) -> httpx.Response:
    kind = {"content-type": "application/octet-stream"}
    return client.put(f"/adapters/{name}", content=data, headers=kind | headers)


class Traffic:
    """Clients that ask for random adapters until told to stop, and check every answer."""

    def __init__(self, server: Served, reference: Reference, clients: int) -> None:
        self.server, self.reference = server, reference
        self.stop = threading.Event()
        self.answers: list[int] = []
        self.pool = ThreadPoolExecutor(clients)
        self.tasks = [self.pool.submit(self._ask, seed) for seed in range(clients)]

    def _ask(self, seed: int) -> int:
        order, answers = random.Random(seed), 0
        with self.server.client() as client:
            while not self.stop.is_set():
                names = order.choices([*NAMES, "base"], k=order.randint(1, 3))
                chosen = order.choices(range(len(INPUTS)), k=order.randint(1, 3))
                body = {"adapters": names, "inputs": [INPUTS[i] for i in chosen]}
                answer = client.post("/encode", json=body)
                assert answer.status_code == 200, answer.text
                self.check(answer.json()["data"], names, chosen)
                answers += 1
        return answers

    def check(self, rows: list[dict], names: list[str], chosen: list[int]) -> None:
        asked = list(itertools.product(chosen, names))
        digest_of: dict[str, str] = {}
        for row, (index, name) in zip(rows, asked, strict=True):
            if name == "base":
                assert row["adapter"] is None
                expected = self.reference.vectors[None][index]
            else:
                assert row["adapter"]["name"] == name
                digest = digest_of.setdefault(name, row["adapter"]["digest"])
                assert row["adapter"]["digest"] == digest  # one digest a request
                expected = self.reference.vectors[digest][index]
            np.testing.assert_allclose(row["embedding"], expected, rtol=0, atol=TOLERANCE)

    def end(self) -> int:
        self.stop.set()
        with self.pool:
            return sum(task.result() for task in self.tasks)


def test_swaps_under_traffic_never_mix_fail_or_leak(server: Served, reference: Reference) -> None:
    order = random.Random(7)
    with server.client() as client:
        for name, data in zip(NAMES, itertools.cycle(reference.files), strict=False):
            assert put(client, name, data).status_code == 201
        traffic = Traffic(server, reference, clients=4)
        for _ in range(SWAPS):
            swap(client, order, reference)
        assert traffic.end() > SWAPS / 20
        info = settled(client)
    assert info["leases"] == 0
    assert info["slots"]["held"] == info["slots"]["leaving"] == 0
    assert info["slots"]["resident"] <= SLOTS
    assert info["slots"]["evictions"] > SWAPS / 10


def swap(client: httpx.Client, order: random.Random, reference: Reference) -> None:
    """Another file for a name, or a pointer moved back, or a version taken out of the slots."""
    name = order.choice(NAMES)
    kind = order.random()
    if kind < 0.7:
        assert put(client, name, order.choice(reference.files)).status_code in (200, 201)
    elif kind < 0.9:
        versions = client.get(f"/adapters/{name}").json()["versions"]
        body = {"version": order.choice(versions)["version"]}
        answer = client.put(f"/adapters/{name}/aliases/current", json=body)
        assert answer.status_code == 200, answer.text
    else:
        assert client.post(f"/adapters/{name}/unload").status_code in (200, 202)


def settled(client: httpx.Client) -> dict:
    for _ in range(100):
        info: dict = client.get("/info").json()
        if info["leases"] == 0:
            return info
        time.sleep(0.05)
    return info


def test_a_request_admitted_before_a_delete_is_answered_on_its_version(
    server: Served, reference: Reference
) -> None:
    """The rows of one request are many, so the delete comes while they wait in the queue."""
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        assert put(client, "doomed", reference.files[0]).status_code == 201
        digest = client.get("/adapters/doomed").json()["digest"]
        inputs = [INPUTS[1]] * 2000
        asked = pool.submit(
            client.post,
            "/encode",
            json={"adapter": "doomed", "inputs": inputs, "timeout_ms": 60000},
        )
        with server.client() as other:
            while other.get("/info").json()["leases"] == 0 and not asked.done():
                time.sleep(0.001)
            deleted = other.delete("/adapters/doomed")
            assert deleted.status_code in (200, 202)
            body = {"adapter": "doomed", "inputs": INPUTS[0]}
            assert other.post("/encode", json=body).status_code == 404
        rows = asked.result().json()["data"]
        assert len(rows) == 2000
        for row in rows:
            assert row["adapter"]["digest"] == digest
            expected = reference.vectors[digest][1]
            np.testing.assert_allclose(row["embedding"], expected, rtol=0, atol=TOLERANCE)
        assert settled(client)["leases"] == 0
