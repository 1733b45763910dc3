"""Amplification: for every route the smallest requests with the largest cost, and what they cost.

AMPLIFICATION_S is for how many seconds each row is sent, to the demo's trunk; 0 sends each once, to
a tiny one. AMPLIFICATION_REPORT names a file for the table, which is printed too.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from amplification import LABELS, LONG_LABEL, OCTETS, VERSIONS, Server, Spent, costs, spend, table
from conftest import Serve
from hostile import Probe, probing

from adapters.format import FORMAT, adapter_bytes
from server.errors import MAX_ERROR_BYTES
from server.keys import new_key

SECONDS = float(os.environ.get("AMPLIFICATION_S", "0"))
LONG = SECONDS > 0
FAN = 64 if LONG else 4
SMALL = {
    "--max-request-tokens": 8192,
    "--max-answer-bytes": 2 << 20,
    "--max-answer-values": 1 << 18,
    "--max-body-bytes": 256 << 10,
    "--max-inputs": 256,
}
NOTED = "x" * 60_000
EXPECTED = {200, 201, 202, 400, 403, 404, 409, 413, 415, 422, 424, 429, 503, 504}


@dataclass(frozen=True)
class Attacked:
    """A server, what it took, and what its probes saw."""

    rows: list[Spent]
    health: Probe
    limits: dict[str, int]
    began: float
    routes: set[tuple[str, str]]


def classifier(digest: str, width: int, classes: int, **metadata: str) -> bytes:
    labels = [f"{i:0{LONG_LABEL}}" for i in range(classes)]
    fields = {"format": FORMAT, "lora_alpha": "8", "base_digest": digest, **metadata}
    weights = {"classifier.weight": torch.randn(classes, width)}
    return adapter_bytes(weights, fields | {"labels": json.dumps(labels)})


def prepare(client: httpx.Client, digest: str, width: int) -> None:
    """The adapters of the rows: a large classifier, many versions, 64 names."""
    labels = LABELS if LONG else 500
    files = [("labels", classifier(digest, width, labels))]
    for number in range(VERSIONS if LONG else 5):
        file = classifier(digest, width, 2, note=NOTED, number=str(number))
        files.append(("many", file))
    one = classifier(digest, width, 2)
    files += [(f"fan/{number}", one) for number in range(FAN)]
    for name, file in files:
        answer = client.put(f"/adapters/{name}", content=file, headers=OCTETS)
        assert answer.status_code == 201, answer.text


@pytest.fixture(scope="module")
def attacked(
    tiny_backbone: Path, serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Attacked:
    folder = tmp_path_factory.mktemp("amplification")
    ring = folder / "keys.json"
    scopes = {"infer", "admin", "metrics"}
    keys = {name: new_key(ring, name, scopes=scopes)[1] for name in ("attacker", "quiet")}
    limits = [str(word) for limit in SMALL.items() for word in limit]
    arguments = ["--keys", ring, "--data", folder / "data", "--import-root", folder]
    arguments += [] if LONG else [tiny_backbone, *limits]
    served = serve_for_session(*arguments)
    url = urlsplit(served.url)
    address = str(url.hostname), url.port or 80
    with httpx.Client(
        base_url=served.url, headers={"x-api-key": keys["attacker"]}, timeout=60
    ) as client:
        info = client.get("/info").json()
        routes = {
            (method.upper(), path)
            for path, methods in client.get("/openapi.json").json()["paths"].items()
            for method in methods
        }
        config = info["config"]
        prepare(client, info["backbone"]["digest"], config["n_embd"])
        attacker = Server(keys["attacker"], info["limits"], config["n_embd"], "[MASK]", FAN)
        quiet = Server(keys["quiet"], info["limits"], config["n_embd"], "[MASK]", FAN)
        request = b"".join(quiet.post("/encode", {"inputs": "to be"}))
        with (
            probing(address, folder, "kept") as health,
            probing(address, folder, "quiet", request) as encodes,
        ):
            began = time.monotonic()
            rows = [spend(address, served.process.pid, cost, SECONDS) for cost in costs(attacker)]
            time.sleep(0.2)  # until the probes have written what was due
            text = table(rows, health, encodes)
    served.process.kill()
    served.process.wait()
    print(text)
    if "AMPLIFICATION_REPORT" in os.environ:
        Path(os.environ["AMPLIFICATION_REPORT"]).write_text(text)
    return Attacked(rows, health, info["limits"], began, routes)


def test_every_route_of_the_document_has_a_row(attacked: Attacked) -> None:
    assert {row.cost.route for row in attacked.rows} == attacked.routes


def test_every_answer_is_bounded_and_none_is_a_fault_of_the_server(attacked: Attacked) -> None:
    """A file that is downloaded is as large as it was uploaded."""
    for row in attacked.rows:
        assert set(row.statuses) <= EXPECTED, (row.cost.name, row.cost.route, row.statuses)
        assert row.largest <= attacked.limits["max_answer_bytes"] or row.cost.name == "the file"
        assert row.largest_error <= MAX_ERROR_BYTES


def test_the_large_ones_are_refused_and_those_that_fit_are_answered(attacked: Attacked) -> None:
    got = {(row.cost.route[1], row.cost.name): set(row.statuses) for row in attacked.rows}
    assert got["/encode", "states of all tokens"] == {413}
    assert got["/tokenize", "a text of a whole body"] == {413}
    if not LONG:  # the demo's answers of labels are large, and within the usual limit
        assert got["/encode", "all labels"] == got["/encode", "labels as safetensors"] == {413}
        assert got["/classify", "labels of many rows"] == {413}
    for name in ("states that fit", "states as safetensors", "short rows"):
        assert 200 in got["/encode", name]
    assert 200 in got["/embed_all", "states that fit"]
    assert 200 in got["/adapters/{name}", f"{VERSIONS} versions, 60 kB of metadata"]


def test_health_answers_beside_all_of_them(attacked: Attacked) -> None:
    samples = [sample for sample in attacked.health.samples() if sample.due >= attacked.began]
    assert samples
    assert [sample for sample in samples if sample.status != 200] == []
