"""served: what HTTP costs, with client, front end and engine on the same cores.

Saturation: a real `trunkline serve`, a closed loop of bulk requests (32 rows of mixed lengths, each
under one adapter), tokens answered a second of wall time. In process: the batches that the same
engine makes of the same requests without HTTP, run again on a device thread of this process while
the server is idle: forward, pooling and what makes results of it. Nothing is taken off for the
client, which runs on the same cores; its share is told. A lone request is short, on a kept
connection; its bare forward runs here. The front end alone is in loadtest/bench/front_end.py.
"""

import base64
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from loadtest.bench import front_end
from loadtest.bench.client import (
    Answer,
    Question,
    ask_one,
    lone_latency,
    on_loop,
    post,
    repeated,
    saturate,
)
from loadtest.bench.in_process import RecordingForward, engine_of
from loadtest.bench.oracle import COSINE, Mismatch, expected
from loadtest.bench.pairs import quotients
from loadtest.bench.plan import Plan
from loadtest.bench.process import Running, cpu_seconds, trunkline
from loadtest.bench.registered import (
    full_files,
    name_of,
    register,
    server_arguments,
    write_trunk,
)
from loadtest.bench.report import Report
from loadtest.bench.trunk import Adapter, Rows, Trunk, mixed_lengths
from server.engine.batcher import Batch

BULK_ROWS = 32
BULK_CONNECTIONS = 8
SINGLE_CONNECTIONS = 128
OCTETS = "application/octet-stream"

# form -> how it is asked for, and how its first row is read
FORMS: dict[str, tuple[dict[str, str], str, Callable[[Answer], bytes]]] = {
    "binary": ({}, OCTETS, lambda answer: answer.body),
    "base64": (
        {"encoding_format": "base64"},
        "application/json",
        lambda answer: base64.b64decode(_first_embedding(answer)),
    ),
    "json": (
        {},
        "application/json",
        lambda answer: np.array(_first_embedding(answer), "<f4").tobytes(),
    ),
}


def _first_embedding(answer: Answer) -> Any:
    return json.loads(answer.body)["data"][0]["embedding"]


@dataclass(frozen=True)
class Bulk:
    """Requests of several rows, each request under one adapter."""

    rows: list[list[Tensor]]  # ids, by request
    adapters: list[tuple[str, Adapter]]  # of each request

    @property
    def requests(self) -> list[tuple[Sequence[Tensor], str]]:
        """Rows and the adapter's name."""
        pairs = zip(self.rows, self.adapters, strict=True)
        return [(rows, name) for rows, (name, _) in pairs]

    def questions(self, form: str) -> list[Question]:
        options, accept, _ = FORMS[form]
        return [
            post(
                "/encode",
                {"adapter": name, "inputs": [row.tolist() for row in rows], **options},
                accept,
                sum(map(len, rows)),
            )
            for rows, (name, _) in zip(self.rows, self.adapters, strict=True)
        ]


def bulk_of(trunk: Trunk, adapters: Sequence[Adapter], rows: int, requests: int) -> Bulk:
    generator = torch.Generator().manual_seed(1)
    lengths = iter(mixed_lengths(requests * rows * 80, seed=1))
    return Bulk(
        [
            [
                torch.randint(trunk.config.vocab_size, (next(lengths),), generator=generator)
                for _ in range(rows)
            ]
            for _ in range(requests)
        ],
        [(name_of(i % len(adapters)), adapters[i % len(adapters)]) for i in range(requests)],
    )


def check_answers(server: Running, trunk: Trunk, bulk: Bulk, forms: Sequence[str]) -> None:
    """The first row of the first requests in every form, against the float32 oracle."""
    for index in range(min(4, len(bulk.rows))):
        rows = Rows(bulk.rows[index][:1], [bulk.adapters[index][1]])
        reference = F.normalize(expected(trunk, rows, 1)[0].mean(0), dim=0).numpy()
        for form in forms:
            answer = on_loop(ask_one(server, bulk.questions(form)[index].request))
            if answer.status != 200:
                raise Mismatch(f"{form}: {answer.status} {answer.body[:300]!r}")
            found = np.frombuffer(FORMS[form][2](answer), "<f4")[: trunk.config.n_embd]
            if not float(found @ reference) >= COSINE:
                raise Mismatch(f"{form}: request {index} differs from the float32 oracle")


def measure(plan: Plan, trunk: Trunk, report: Report) -> None:
    adapters = trunk.adapters(max(plan.sizes.adapters), plan.shape.ranks[0])
    requests = len(adapters) if plan.sizes.further else len(adapters) // 4
    bulk = bulk_of(trunk, adapters, BULK_ROWS, max(1, requests))
    single = bulk_of(trunk, adapters, 1, 8 * len(adapters))
    data = plan.scratch / "served"
    register(data, trunk, full_files(trunk, len(adapters), plan.shape.ranks[0]))
    folder = register(
        plan.scratch / "in-process", trunk, full_files(trunk, len(adapters), plan.shape.ranks[0])
    )
    arguments = server_arguments(plan, write_trunk(plan.scratch, trunk), data)
    with trunkline(plan.scratch / "served.log", *arguments) as server:
        check_answers(server, trunk, bulk, list(FORMS))
        _measure_saturation(plan, trunk, report, server, folder, bulk, single)
        _measure_lone(plan, trunk, report, server)
    front_end.measure(plan, report)


async def batches_of(
    plan: Plan, trunk: Trunk, folder: Path, requests: Sequence[tuple[Sequence[Tensor], str]]
) -> tuple[RecordingForward, list[Batch]]:
    """The batches that the engine makes of these requests when their adapters are resident."""
    async with engine_of(plan, trunk, folder) as it:
        for name in {name for _, name in requests}:
            it.library.load(name, timeout_s=60)
        return it.forward, await it.ask_all(requests, BULK_CONNECTIONS)


def _measure_saturation(
    plan: Plan,
    trunk: Trunk,
    report: Report,
    server: Running,
    folder: Path,
    bulk: Bulk,
    single: Bulk,
) -> None:
    sizes = plan.sizes
    loads = {form: (bulk.questions(form), BULK_CONNECTIONS) for form in FORMS}
    if sizes.further:
        loads["one row"] = (single.questions("binary"), SINGLE_CONNECTIONS)
    rates: dict[str, list[float]] = {name: [] for name in loads}

    def load(name: str) -> float:
        return on_loop(saturate(server, *loads[name]))

    # The first requests are slow ones: adapters are loaded, kernels are made.
    load("binary")
    first = load("binary")
    loads = {
        name: (repeated(questions, first, sizes.window_s), connections)
        for name, (questions, connections) in loads.items()
    }
    passes = len(loads["binary"][0]) // len(bulk.rows)
    forward, batches = on_loop(batches_of(plan, trunk, folder, bulk.requests * passes))
    tokens = statistics.mean(batch.packed.ids.shape[0] for batch in batches)
    in_process: list[float] = []
    client_s = server_s = 0.0
    for _ in range(sizes.slow_rounds):
        for name in loads:
            before = _own_cpu(), cpu_seconds(server.pid)
            rates[name].append(load(name))
            client_s += _own_cpu() - before[0]
            server_s += cpu_seconds(server.pid) - before[1]
        rate = trunk.device_thread.submit(forward.run_again, batches)
        in_process.append(rate.result())
    share = client_s / (client_s + server_s)
    note = f"{BULK_ROWS} rows a request, batches of {tokens:,.0f} tokens"
    for form in FORMS:
        said = f"{note}; {statistics.median(rates[form]):,.0f} tokens/s"
        what = f"HTTP at saturation / forward, {form}"
        values = quotients(rates[form], in_process)
        report.ratio("served", what, f"http_over_forward.{form}", values, said)
    if sizes.further:
        values = quotients(rates["one row"], in_process)
        what, key = "the same, one row a request, binary", "also.http_one_row_over_forward"
        report.ratio("served", what, key, values, f"{SINGLE_CONNECTIONS} connections")
    report.note("served", "client's share of the processor time", f"{share:.1%}", "not taken off")


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _measure_lone(plan: Plan, trunk: Trunk, report: Report, server: Running) -> None:
    count = plan.sizes.lone_requests
    rows = trunk.rows([front_end.LONE_TOKENS])
    question = post("/encode", {"inputs": rows.ids[0].tolist()}, OCTETS, front_end.LONE_TOKENS)
    through_http: list[float] = []
    bare: list[float] = []
    for measured in range(plan.sizes.slow_rounds + 1):
        seconds = on_loop(lone_latency(server, question, count))
        forwards = trunk.device_thread.submit(_times, lambda: trunk.embed(rows), count).result()
        if measured:  # the first is a warm-up
            through_http.append(statistics.median(seconds))
            bare.append(statistics.median(forwards))
    middle = statistics.median(through_http), statistics.median(bare)
    report.ratio(
        "served",
        f"lone request of {front_end.LONE_TOKENS} tokens / its bare forward, p50",
        "lone_http_over_forward",
        quotients(through_http, bare),
        f"{middle[0] * 1e3:.2f} ms and {middle[1] * 1e3:.2f} ms",
    )


def _times(action: Callable[[], object], count: int) -> list[float]:
    spent = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        spent.append(time.perf_counter() - began)
    return spent
