"""swap: new versions while traffic flows.

From PUT to first answer: from the upload's first byte until the bare name's answer by the new
version is there. Steady traffic: an open loop of single rows at two fifths of what the server can
answer, each request's time from when it was due; the same traffic without and with ten uploads a
second that replace what it asks for. An error is an answer other than 200, or one that is not
the oracle's for the version that it names.
"""

import asyncio
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from adapters.format import adapter_bytes
from loadtest.bench.client import (
    Answer,
    Connection,
    Question,
    Sent,
    ask_one,
    on_loop,
    post,
    put,
    repeated,
    saturate,
    steady,
)
from loadtest.bench.oracle import COSINE, Mismatch, expected
from loadtest.bench.pairs import quotients
from loadtest.bench.plan import Plan
from loadtest.bench.process import Running, trunkline
from loadtest.bench.registered import full_files, name_of, register, server_arguments, write_trunk
from loadtest.bench.report import Report
from loadtest.bench.served import OCTETS
from loadtest.bench.trunk import Rows, Trunk, mixed_lengths

NAMES = 8  # that the traffic asks for
TEXTS = 12  # different rows
SHARE = 0.4  # of what the server can answer
CONNECTIONS = 64
METADATA = "x-trunkline-metadata"


class Traffic:
    """Rows under names, new files for the names, and what the oracle says of every answer."""

    def __init__(self, trunk: Trunk, rank: int) -> None:
        generator = torch.Generator().manual_seed(2)
        lengths = mixed_lengths(TEXTS * 400, seed=2)[:TEXTS]
        self.rows = [
            torch.randint(trunk.config.vocab_size, (length,), generator=generator)
            for length in lengths
        ]
        self.adapters = trunk.adapters(NAMES, rank)
        self._references = []  # by weight set, (TEXTS, C)
        for adapter in self.adapters:
            states = expected(trunk, Rows(self.rows, [adapter] * TEXTS), TEXTS)
            pooled = torch.stack([states[row].mean(0) for row in range(TEXTS)])
            self._references.append(F.normalize(pooled, dim=1).numpy())
        _demand_apart(np.stack(self._references))
        self._weights = {adapter.set.digest: n for n, adapter in enumerate(self.adapters)}
        self._number = itertools.count(1)
        # Every row under every name: the index is name * TEXTS + row.
        self.questions: list[Question] = [
            post("/encode", {"adapter": name_of(n), "inputs": row.tolist()}, OCTETS, len(row))
            for n in range(NAMES)
            for row in self.rows
        ]

    def uploads(self, count: int) -> list[bytes]:
        """PUTs for the names in turn: files that were never uploaded, of ever other weights."""
        requests = []
        for number in itertools.islice(self._number, count):
            name, weights = number % NAMES, (number + number // NAMES) % NAMES
            adapter = self.adapters[weights].set
            metadata = dict(adapter.metadata) | {"number": str(number)}
            file = adapter_bytes(adapter.tensors, metadata)
            self._weights[f"sha256:{hashlib.sha256(file).hexdigest()}"] = weights
            requests.append(put(f"/adapters/{name_of(name)}", file))
        return requests

    def is_right(self, question: int, answer: Answer) -> bool:
        if answer.status != 200:
            return False
        digest = json.loads(answer.header(METADATA))["adapters"][0]["digest"]
        if digest not in self._weights:
            return False
        reference = self._references[self._weights[digest]][question % TEXTS]
        return float(np.frombuffer(answer.body, "<f4") @ reference) >= COSINE


def _demand_apart(references: np.ndarray) -> None:
    """references (sets, rows, C), of length 1. Raises Mismatch where any set would pass."""
    cosines = np.einsum("arc,brc->abr", references, references)
    if cosines[~np.eye(len(references), dtype=bool)].max() >= COSINE:
        raise Mismatch("two adapters are so alike that an answer would pass under either")


def measure(plan: Plan, trunk: Trunk, report: Report) -> None:
    sizes, rank = plan.sizes, plan.shape.ranks[0]
    traffic = Traffic(trunk, rank)
    data = plan.scratch / "swap"
    register(data, trunk, full_files(trunk, NAMES, rank))
    arguments = server_arguments(plan, write_trunk(plan.scratch, trunk), data)
    with trunkline(plan.scratch / "swap.log", *arguments) as server:
        for index in range(0, len(traffic.questions), TEXTS + 1):
            if not traffic.is_right(
                index, on_loop(ask_one(server, traffic.questions[index].request))
            ):
                raise Mismatch("swap: an answer differs from the float32 oracle")
        _measure_put(plan, report, server, traffic)
        tokens_per_s = _saturation(server, traffic.questions, sizes.window_s)
        mean = statistics.mean(question.tokens for question in traffic.questions)
        _measure_steady(plan, report, server, traffic, SHARE * tokens_per_s / mean)


def _saturation(server: Running, questions: Sequence[Question], window_s: float) -> float:
    """Tokens a second, after all rows were asked for once."""
    first = on_loop(saturate(server, questions, CONNECTIONS))
    return on_loop(saturate(server, repeated(questions, first, window_s), CONNECTIONS))


def _measure_put(plan: Plan, report: Report, server: Running, traffic: Traffic) -> None:
    spent = []
    for request in traffic.uploads(plan.sizes.puts):
        name = request.split(b" ", 2)[1].decode().removeprefix("/adapters/")
        question = next(q for q in traffic.questions if f'"{name}"'.encode() in q.request)
        spent.append(on_loop(_put_and_ask(server, request, question.request)))
    milliseconds = [value * 1e3 for value in spent]
    what = "from PUT to first answer, ms"
    note = "an absolute time: of this machine and this run alone"
    report.ratio("swap", what, "also.put_to_first_answer_ms", milliseconds, note)


async def _put_and_ask(server: Running, upload: bytes, question: bytes) -> float:
    connections = [await Connection.open(server) for _ in range(2)]
    began = time.perf_counter()
    stored = await connections[0].ask(upload)
    answer = await connections[1].ask(question)
    spent = time.perf_counter() - began
    for connection in connections:
        connection.close()
    wanted = json.loads(stored.body).get("digest")
    named = json.loads(answer.header(METADATA))["adapters"][0]["digest"]
    if stored.status != 201 or named != wanted:
        raise Mismatch(f"swap: {stored.status}, and the answer is of {named}, not {wanted}")
    return spent


def _measure_steady(
    plan: Plan, report: Report, server: Running, traffic: Traffic, rate: float
) -> None:
    sizes = plan.sizes
    p99: dict[str, list[float]] = {"without": [], "with": []}
    errors = []
    swaps = 0
    for seed in range(sizes.slow_rounds):
        uploads = traffic.uploads(round(sizes.swap_window_s * sizes.swaps_per_s))
        for kind, some in (("without", []), ("with", uploads)):
            window = _window(server, traffic, rate, sizes.swap_window_s, some, seed)
            sent, refused = on_loop(window)
            wrong = sum(not traffic.is_right(each.index, each.answer) for each in sent)
            p99[kind].append(float(np.quantile([each.seconds for each in sent], 0.99)))
            swaps += len(some)
            errors.append(wrong + refused)
    middle = statistics.median(p99["with"]) * 1e3, statistics.median(p99["without"]) * 1e3
    report.ratio(
        "swap",
        f"p99 with {sizes.swaps_per_s:g} swaps/s / without",
        "swap_p99_over_steady",
        quotients(p99["with"], p99["without"]),
        f"{rate:,.0f} requests/s, {swaps} swaps; {middle[0]:.1f} ms and {middle[1]:.1f} ms",
    )
    report.count("swap", "errors and wrong answers", "swap_errors", errors)


async def _window(
    server: Running,
    traffic: Traffic,
    rate: float,
    window_s: float,
    uploads: Sequence[bytes],
    seed: int,
) -> tuple[list[Sent], int]:
    """A window of steady traffic, and how many uploads were refused."""
    swapping = asyncio.create_task(_upload(server, uploads, window_s))
    sent = await steady(server, traffic.questions, rate, window_s, seed)
    return sent, await swapping


async def _upload(server: Running, uploads: Sequence[bytes], window_s: float) -> int:
    """Evenly over the window, each when it is due; how many were refused."""
    refused = 0
    began = time.perf_counter()
    connection = await Connection.open(server)
    for index, upload in enumerate(uploads):
        await asyncio.sleep(max(0.0, began + window_s * index / len(uploads) - time.perf_counter()))
        refused += (await connection.ask(upload)).status != 201
    connection.close()
    return refused
