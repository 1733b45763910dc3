"""SIGKILL at random points of uploads, promotions and deletes: the old state or the new one.

`make crash` does 200 kills; `make test` a few.
"""

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import TINY, Served, random_adapter, start_server
from registry_model import Name

from adapters.format import adapter_bytes
from model.checkpoint import read_backbone

KILLS = int(os.environ.get("KILLS", "3"))
SEED = int(os.environ.get("CRASH_SEED", "1"))
WRITERS = 3
FILES = 5


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Writer:
    """Changes names of its own, and knows what was acknowledged and what was under way."""

    def __init__(self, number: int, files: list[bytes]) -> None:
        self.order = random.Random(SEED * 1000 + number)
        self.files = files
        self.names = {f"writer-{number}/{letter}": Name() for letter in "abc"}
        self.pending: tuple[str, Callable[[Name], object]] | None = None
        self.acknowledged = 0

    def run(self, url: str) -> None:
        """Until the server dies."""
        with httpx.Client(base_url=url, timeout=30) as client:
            try:
                while True:
                    self.change(client)
            except httpx.TransportError:
                return

    def change(self, client: httpx.Client) -> None:
        name = self.order.choice(list(self.names))
        known, kind = self.names[name], self.order.random()
        number = self.order.choice(list(known.versions) or [1])
        if kind < 0.55 or not known.versions:
            self.put(client, name, self.order.choice(self.files), self.order.random() < 0.8)
        elif kind < 0.8:
            alias = self.order.choice(["current", "stable"])
            self.pending = name, lambda known: known.point(alias, number)
            self.done(client.put(f"/adapters/{name}/aliases/{alias}", json={"version": number}))
        elif kind < 0.95:
            self.pending = name, lambda known: known.drop(number)
            self.done(client.delete(f"/adapters/{name}/versions/{number}"))
        else:
            self.pending = name, Name.drop_all
            self.done(client.delete(f"/adapters/{name}"))

    def put(self, client: httpx.Client, name: str, data: bytes, activate: bool) -> None:
        self.pending = name, lambda known: known.put(digest_of(data), activate)
        headers = {"content-type": "application/octet-stream"}
        query = {"activate": str(activate).lower()}
        self.done(client.put(f"/adapters/{name}", content=data, headers=headers, params=query))

    def done(self, answer: httpx.Response) -> None:
        assert answer.status_code in (200, 201, 202), answer.text
        assert self.pending is not None
        name, effect = self.pending
        effect(self.names[name])
        self.pending = None
        self.acknowledged += 1

    def check(self, client: httpx.Client) -> int:
        """After a restart: what is there is what was acknowledged, with or without the pending."""
        applied = 0
        for name, known in self.names.items():
            states = [known]
            if self.pending is not None and self.pending[0] == name:
                after = known.copy()
                self.pending[1](after)
                states.append(after)
            found = seen(client, name)
            matching = [state for state in states if state.visible() == found]
            assert matching, f"{name}: found {found}, expected {[s.visible() for s in states]}"
            applied += matching[0] is not known
            self.names[name] = matching[0]
        self.pending = None
        return applied


def acknowledge_something(writers: list[Writer]) -> None:
    """On a busy machine too each round has changes that may be lost."""
    before, until = sum(writer.acknowledged for writer in writers), time.monotonic() + 60
    while sum(writer.acknowledged for writer in writers) < before + 2:
        assert time.monotonic() < until
        time.sleep(0.005)


def seen(client: httpx.Client, name: str) -> tuple[dict[int, str], dict[str, tuple[int, int]]]:
    answer = client.get(f"/adapters/{name}")
    if answer.status_code == 404:
        return {}, {}
    named = answer.json()
    assert client.post(f"/adapters/{name}/verify").json()["sound"]
    return (
        {version["version"]: version["digest"] for version in named["versions"]},
        {alias: (p["version"], p["generation"]) for alias, p in named["aliases"].items()},
    )


def files_on_disk(data: Path) -> set[str]:
    (blobs,) = data.glob("*/blobs")
    assert not any((blobs / "incoming").iterdir())
    return {f"sha256:{path.name}" for path in blobs.iterdir() if path.is_file()}


@pytest.fixture
def files(tiny_backbone: Path) -> list[bytes]:
    metadata = {"lora_alpha": "8.0", "base_digest": read_backbone(tiny_backbone).digest}
    sets = [random_adapter(TINY, 500 + seed, ranks=1 + seed) for seed in range(FILES)]
    return [adapter_bytes(tensors, metadata) for tensors in sets]


def test_after_sigkill_the_old_state_or_the_new_nothing_between_nothing_lost(
    tiny_backbone: Path, tmp_path: Path, files: list[bytes]
) -> None:
    writers = [Writer(number, files) for number in range(WRITERS)]
    order, data, applied = random.Random(SEED), tmp_path / "data", 0

    def start(number: int) -> Served:
        log = tmp_path / f"{number}.log"
        adapters = tmp_path / "no-seeds"
        adapters.mkdir(exist_ok=True)
        return start_server(
            log, tiny_backbone, "--adapters", adapters, TRUNKLINE_DATA_DIR=str(data)
        )

    server = start(0)
    try:
        for kill in range(1, KILLS + 1):
            threads = [threading.Thread(target=w.run, args=(server.url,)) for w in writers]
            for thread in threads:
                thread.start()
            acknowledge_something(writers)
            time.sleep(order.uniform(0.05, 0.6))
            server.process.kill()
            server.process.wait()
            for thread in threads:
                thread.join()
            server = start(kill)
            with server.client() as client:
                applied += sum(writer.check(client) for writer in writers)
                live = {d for w in writers for n in w.names.values() for d in n.versions.values()}
                assert files_on_disk(data) == live
    finally:
        server.process.kill()
        server.process.wait()
    acknowledged = sum(writer.acknowledged for writer in writers)
    print(
        f"{KILLS} kills, {acknowledged} operations acknowledged, {applied} applied unacknowledged"
    )
    assert acknowledged > KILLS
