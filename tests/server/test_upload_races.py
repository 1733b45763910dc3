"""Sixteen threads upload equal and different bytes at once, with conditions and without, under
several names and keys, and delete between: what was acknowledged is there, also after a restart.

`make races` does 300 rounds; `make test` a few.
"""

import hashlib
import os
import random
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import TINY, Serve, Served, random_adapter

from adapters.format import adapter_bytes
from model.checkpoint import read_backbone
from server.keys import new_key

ROUNDS = int(os.environ.get("RACE_ROUNDS", "1"))
SEED = int(os.environ.get("RACE_SEED", "1"))
THREADS, CHANGES = 16, 4  # of each thread in a round
NAMES = [f"{tenant}/{letter}" for tenant in ("acme", "other") for letter in "abc"]


@pytest.fixture(scope="module")
def files(tiny_backbone: Path) -> list[bytes]:
    metadata = {"lora_alpha": "8.0", "base_digest": read_backbone(tiny_backbone).digest}
    sets = [random_adapter(TINY, 900 + seed, ranks=1) for seed in range(3)]
    return [adapter_bytes(tensors, metadata) for tensors in sets]


class Told:
    """What the server acknowledged. Versions are by (name, number): numbers are given once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.put: dict[tuple[str, int], str] = {}
        self.deleted: set[tuple[str, int]] = set()
        self.statuses: dict[int, int] = defaultdict(int)


class Racer:
    def __init__(self, number: int, server: Served, secrets: dict[str, str], told: Told) -> None:
        self.order = random.Random(SEED * 1000 + number)
        self.told, self.secrets = told, secrets
        self.client = httpx.Client(base_url=server.url, timeout=120)

    def headers(self, name: str) -> dict[str, str]:
        secret = self.secrets[name.partition("/")[0]]
        return {"authorization": f"Bearer {secret}", "content-type": "application/octet-stream"}

    def round(self, files: list[bytes]) -> None:
        for _ in range(CHANGES):
            name = self.order.choice(NAMES)
            if self.order.random() < 0.25:
                self.delete(name)
            else:
                self.upload(name, self.order.choice(files))

    def upload(self, name: str, data: bytes) -> None:
        condition = self.order.choice(
            [{}, {}, {"if-none-match": "*"}, {"if-match": "*"}, {"if-match": '"1"'}]
        )
        answer = self.client.put(
            f"/adapters/{name}", content=data, headers=self.headers(name) | condition
        )
        with self.told.lock:
            self.told.statuses[answer.status_code] += 1
            if answer.status_code in (200, 201):
                digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
                assert answer.json()["digest"] == digest
                self.told.put[name, answer.json()["version"]] = digest
            else:
                assert answer.status_code == 412, answer.text

    def delete(self, name: str) -> None:
        number = self.order.choice([number for n, number in [*self.told.put] if n == name] or [1])
        path = f"/adapters/{name}/versions/{number}"
        answer = self.client.delete(path, headers=self.headers(name))
        with self.told.lock:
            self.told.statuses[answer.status_code] += 1
            if answer.status_code in (200, 202):
                self.told.deleted.add((name, number))
            else:
                assert answer.status_code == 404, answer.text


def check(racer: Racer, told: Told) -> int:
    """Every acknowledged version that nobody deleted downloads with its digest; how many."""
    alive = {at: digest for at, digest in told.put.items() if at not in told.deleted}
    for (name, number), digest in alive.items():
        answer = racer.client.get(f"/adapters/{name}@{number}/file", headers=racer.headers(name))
        assert answer.status_code == 200, (name, number, answer.text)
        assert f"sha256:{hashlib.sha256(answer.content).hexdigest()}" == digest
    for name, number in told.deleted:
        answer = racer.client.get(
            f"/adapters/{name}/versions/{number}", headers=racer.headers(name)
        )
        assert answer.status_code == 404
    return len(alive)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    wishes = {"scopes": ["infer", "admin"]}
    path = tmp_path / "data" / "keys.json"
    return {
        tenant: new_key(path, tenant, adapters=(f"{tenant}/*",), **wishes)[1]
        for tenant in ("acme", "other")
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_what_sixteen_threads_were_told_is_there_after_each_round_and_a_restart(
    tiny_backbone: Path, serve: Serve, folder: Path, keys: dict[str, str], files: list[bytes]
) -> None:
    told = Told()
    (no_seeds := folder.parent / "no-seeds").mkdir()
    arguments = (tiny_backbone, "--data", folder, "--dtype", "float32", "--adapters", no_seeds)
    server = serve(*arguments)
    racers = [Racer(number, server, keys, told) for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(ROUNDS):
            list(pool.map(lambda racer: racer.round(files), racers))
            check(racers[0], told)
    server.process.kill()
    server.process.wait()
    again = serve(*arguments)
    racers.append(Racer(0, again, keys, told))
    alive = check(racers[-1], told)
    (blobs,) = folder.glob("*/blobs")
    named = {digest for at, digest in told.put.items() if at not in told.deleted}
    assert {f"sha256:{each.name}" for each in blobs.iterdir() if each.is_file()} == named
    again.stop()
    for racer in racers:
        racer.client.close()
    print(f"{ROUNDS} rounds: {dict(told.statuses)}, {alive} versions alive, 0 lost")
    assert told.statuses[201] > ROUNDS
    assert told.statuses[412] > 0
