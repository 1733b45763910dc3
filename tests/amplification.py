"""The smallest requests with the largest cost, for every route; what they cost the server.

A row is of one route of the OpenAPI document. Its requests are sent by an attacker's key, while
GET /health and a quiet key's /encode are timed by processes of their own.
"""

import io
import json
import os
import re
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from hostile import ATTACKERS, Address, Attacker, Parts, Probe, quantile

JSON = {"content-type": "application/json"}
OCTETS = {"content-type": "application/octet-stream"}
SAFETENSORS = {"accept": "application/vnd.safetensors"}
VERSIONS, LABELS, LONG_LABEL = 60, 10_000, 20
ZIPPED = 64 << 20  # bytes of zeros in a PEFT archive


@dataclass(frozen=True)
class Cost:
    """One request that costs much, of a route of the document."""

    name: str
    route: tuple[str, str]  # method and path, as the document has them
    request: Parts


@dataclass
class Spent:
    """What a row got, and what it cost."""

    cost: Cost
    statuses: Counter[int] = field(default_factory=Counter)
    largest: int = 0  # bytes of an answer's body
    largest_error: int = 0
    began: float = 0.0
    ended: float = 0.0
    peak_mib: int = 0  # resident, of the server

    def add(self, status: int, size: int) -> None:
        self.statuses[status] += 1
        self.largest = max(self.largest, size)
        if status >= 400:
            self.largest_error = max(self.largest_error, size)


@dataclass(frozen=True)
class Server:
    """What the requests are made for: the limits of /info, and an attacker's key."""

    key: str
    limits: dict[str, int]
    width: int
    mask: str
    fan: int  # adapters fan/0, fan/1, ...

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] = JSON
    ) -> Parts:
        fields = {"host": "x", "x-api-key": self.key, "content-length": len(body)} | headers
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {v}" for name, v in fields.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii"), body

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Parts:
        return self.request("POST", path, json.dumps(body).encode(), JSON | (headers or {}))


def costs(server: Server) -> Iterator[Cost]:
    """The rows, in order: those that delete come last."""
    for rows in (_inference, _others_shapes, _texts, _reads, _administration):
        yield from rows(server)


def _inference(server: Server) -> Iterator[Cost]:
    rows, block = server.limits["max_inputs"], server.limits["block_size"]
    tokens = server.limits["max_request_tokens"]
    full = [[5] * block] * (tokens // block)
    fits = [[5] * block] * max(1, _states(server) // block)
    masks = [server.mask * (block // 2)] * 2
    labels = {"adapter": "labels", "inputs": [[5]] * 100}
    encode = "/encode", ("POST", "/encode")

    def row(name: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Cost:
        return Cost(name, encode[1], server.post(encode[0], body, headers))

    states = {"outputs": ["tokens"]}
    yield row("short rows", {"inputs": [[5]] * rows})
    yield row("states of all tokens", states | {"inputs": full})
    yield row("states that fit", states | {"inputs": fits})
    yield row("states as safetensors", states | {"inputs": fits}, SAFETENSORS)
    yield row("base64", {"inputs": [[5]] * rows, "encoding_format": "base64"})
    yield row("likely tokens", {"inputs": masks, "outputs": ["logits"], "top_k": 1000})
    yield row("all labels", labels | {"outputs": ["labels"]})
    yield row("labels as safetensors", labels | {"outputs": ["labels"]}, SAFETENSORS)
    fan_out = {"inputs": fits[0], "adapters": [f"fan/{i % server.fan}" for i in range(64)]}
    yield row("64 adapters", fan_out | {"outputs": ["embedding", "critic"]})
    yield row("every row is wrong", {"inputs": [[1 << 60]] * rows})
    critic = server.post("/critic", {"inputs": full})
    yield Cost("all tokens", ("POST", "/critic"), critic)
    yield Cost("labels of many rows", ("POST", "/classify"), server.post("/classify", labels))
    one = {"adapter": "labels", "inputs": [[5]] * 8}
    yield Cost("labels of eight rows", ("POST", "/classify"), server.post("/classify", one))


def _states(server: Server) -> int:
    """How many tokens' states an answer may have, by its bytes."""
    limits, of_a_token = server.limits, 20 * server.width + 200
    most = limits["max_answer_bytes"] // of_a_token, limits["max_answer_values"] // server.width
    return min(*most, limits["max_request_tokens"])


def _others_shapes(server: Server) -> Iterator[Cost]:
    rows, block = server.limits["max_inputs"], server.limits["block_size"]
    texts = ["to be or not"] * (rows - 1)
    long = ["to be " * (block // 6)] * max(1, _states(server) // block)
    body = server.limits["max_body_bytes"]
    nested: Any = "text"
    for _ in range(50):
        nested = [nested]
    document = {"text": "to be", "more": [nested] * 20 + [1e15] * 200}
    documents = [document] * min(rows - 1, body // len(json.dumps(document)) - 1)

    def row(name: str, path: str, sent: dict[str, Any]) -> Cost:
        return Cost(name, ("POST", path), server.post(path, sent))

    ranked = {"query": "to be", "documents": documents, "return_documents": True}
    yield row("short texts", "/embed", {"inputs": texts})
    yield row("short texts", "/", {"inputs": texts})
    yield row("states that fit", "/embed_all", {"inputs": long})
    yield row("states of many texts", "/embed_all", {"inputs": long * 4})
    yield row("many sentences", "/similarity", {"source_sentence": "to", "sentences": texts})
    yield row("labels", "/predict", {"adapter": "labels", "inputs": [["to"]] * 100})
    yield row("short texts", "/v1/embeddings", {"model": "base", "input": texts})
    yield row("nested documents", "/rerank", ranked)
    yield row("nested documents", "/v1/rerank", ranked)
    yield row("short texts", "/v2/rerank", {"query": "to be", "documents": texts})


def _texts(server: Server) -> Iterator[Cost]:
    body, tokens = server.limits["max_body_bytes"], server.limits["max_request_tokens"]

    def row(name: str, path: str, sent: dict[str, Any]) -> Cost:
        return Cost(name, ("POST", path), server.post(path, sent))

    yield row("a text of a whole body", "/tokenize", {"inputs": "to be " * (body // 6 - 100)})
    yield row("as many tokens as may be", "/tokenize", {"inputs": "to be" * (tokens // 8)})
    yield row("a text without a space", "/tokenize", {"inputs": "x" * (body // 4)})
    yield row("one text, cut", "/embed", {"inputs": "to be " * (body // 24), "truncate": True})
    yield row("as many ids as may be", "/detokenize", {"ids": [9] * tokens})


def _reads(server: Server) -> Iterator[Cost]:
    def row(name: str, path: str, route: str | None = None) -> Cost:
        return Cost(name, ("GET", route or path), server.request("GET", path))

    yield row("a page of 1,000", "/adapters?limit=1000&sort=requests", "/adapters")
    yield row(f"{VERSIONS} versions, 60 kB of metadata", "/adapters/many", "/adapters/{name}")
    version = "/adapters/{name}/versions/{number}"
    yield row("10,000 labels", "/adapters/labels/versions/1", version)
    yield row("the file", "/adapters/labels/file", "/adapters/{name}/file")
    yield row("all", "/v1/models")
    yield row("one", "/v1/models/labels", "/v1/models/{model}")
    yield row("two of 10,000 labels", "/diff?a=labels&b=labels@1", "/diff")
    for path in ("/health", "/ready", "/openapi.json", "/metrics", "/info", "/debug/engine"):
        yield row("", path)


def _administration(server: Server) -> Iterator[Cost]:
    for verb in ("load", "pin", "unpin", "unload", "verify"):
        name = "many" if verb == "verify" else "labels"
        path = f"/adapters/{name}/{verb}"
        yield Cost(name, ("POST", f"/adapters/{{name}}/{verb}"), server.request("POST", path))
    route = ("PUT", "/adapters/{name}")
    kind = {"content-type": "application/zip"}
    yield Cost("zeros in a zip", route, server.request("PUT", "/adapters/new", _bomb(), kind))
    many = json.dumps({f"{i:07}": [0] for i in range(100_000)}).encode()
    header = len(many).to_bytes(8, "little") + many
    yield Cost("a large header", route, server.request("PUT", "/adapters/new", header, OCTETS))
    alias = ("PUT", "/adapters/{name}/aliases/{alias}")
    moved = server.request("PUT", "/adapters/many/aliases/stable", b'{"version": 1}')
    yield Cost("an alias", alias, moved)
    lora = {"lora_name": "x", "lora_path": "a/" * 1000}
    for verb in ("load", "unload"):
        path = f"/v1/{verb}_lora_adapter"
        sent = lora if verb == "load" else {"lora_name": "nothing"}
        yield Cost(
            "a long path" if verb == "load" else "none", ("POST", path), server.post(path, sent)
        )
    version = ("DELETE", "/adapters/{name}/versions/{number}")
    yield Cost("a version", version, server.request("DELETE", "/adapters/many/versions/2"))
    yield Cost(
        f"{VERSIONS} versions",
        ("DELETE", "/adapters/{name}"),
        server.request("DELETE", "/adapters/many"),
    )


def _bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", json.dumps({"peft_type": "LORA", "r": 4}))
        archive.writestr("adapter_model.safetensors", bytes(ZIPPED))
    return out.getvalue()


def spend(address: Address, process: int, cost: Cost, seconds: float) -> Spent:
    """Send the row's request again and again for so long, once at least, by each attacker."""
    spent = Spent(cost, began=time.monotonic())
    _reset_peak(process)
    attackers = ATTACKERS if seconds else 1
    with ThreadPoolExecutor(attackers) as threads:
        for found in threads.map(lambda _: _send(address, cost, seconds), range(attackers)):
            for status, size in found:
                spent.add(status, size)
    spent.ended, spent.peak_mib = time.monotonic(), _peak_mib(process)
    return spent


def _send(address: Address, cost: Cost, seconds: float) -> list[tuple[int, int]]:
    found, until = [], time.monotonic() + seconds
    with closing(Attacker(address)) as attacker:
        while not found or time.monotonic() < until:
            try:
                answer = attacker.ask(cost.request)
                found.append((answer.status, len(answer.body)))
            except (OSError, HTTPException):
                attacker.close()
                found.append((0, 0))
    return found


def _reset_peak(process: int) -> None:
    with suppress(OSError):  # the peak is then that of all rows so far
        Path(f"/proc/{process}/clear_refs").write_text("5")


def _peak_mib(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) >> 10


def table(rows: Sequence[Spent], health: Probe, quiet: Probe) -> str:
    """Markdown: what each row got, and what /health, a quiet key and the memory were meanwhile."""
    samples, encodes = health.samples(), quiet.samples()
    head = (
        "route | request | bytes sent | status: times | largest answer, bytes | /health p50 ms | "
        "p99 ms | quiet key p99 ms | peak memory MiB"
    )
    lines = [f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end.", ""]
    lines += [f"| {head} |", f"| --- | --- |{' ---: |' * 7}"]
    for spent in rows:
        span = spent.began, spent.ended
        statuses = ", ".join(f"{status}: {n:,}" for status, n in sorted(spent.statuses.items()))
        cells = [
            " ".join(spent.cost.route),
            spent.cost.name,
            f"{sum(map(len, spent.cost.request)):,}",
            statuses,
            f"{spent.largest:,}",
            *(quantile(samples, share, *span) for share in (0.5, 0.99)),
            quantile(encodes, 0.99, *span),
            str(spent.peak_mib),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
