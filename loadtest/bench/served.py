"""served: what HTTP costs, with client, front end and engine on the same cores.

Saturation: a real `trunkline serve`, a closed loop of bulk requests (32 rows of mixed lengths, each
under one adapter), tokens answered a second of wall time. In process: the same rows, dealt into
batches of as many tokens as the server's had, through the forward and the pooling, in this process
while the server is idle. Nothing is taken off for the client, which runs on the same cores; its
share is told. A lone request is short, on a kept connection; its bare forward runs here.

The front end alone: a trunk too small to matter, beside a route of bare Starlette that parses the
same body and answers the same bytes; the same client loads both.
"""

import base64
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
from loadtest.bench.oracle import COSINE, Mismatch, expected
from loadtest.bench.pairs import quotients
from loadtest.bench.plan import Plan, Shape
from loadtest.bench.process import Running, cpu_seconds, running, trunkline
from loadtest.bench.registered import full_files, name_of, register, write_trunk
from loadtest.bench.report import Report
from loadtest.bench.trunk import Adapter, Rows, Trunk, mixed_lengths
from loadtest.server_metrics import ServerMetrics

BULK_ROWS = 32
BULK_CONNECTIONS = 8
SINGLE_CONNECTIONS = 128
FRONT_CONNECTIONS = 32
FRONT_WARM_UP = 1000  # requests
LONE_TOKENS = 16
FRONT_END = Shape(n_embd=32, n_layer=1, n_head=2, ranks=(8,))
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

    def batches(self, tokens: int, at_once: int) -> list[Rows]:
        """The rows of `at_once` requests at a time dealt into batches of about `tokens` each."""
        made = []
        for start in range(0, len(self.rows), at_once):
            requests = range(start, min(start + at_once, len(self.rows)))
            dealt = [
                (i, self.rows[i][row])
                for row in range(max(len(self.rows[i]) for i in requests))
                for i in requests
                if row < len(self.rows[i])
            ]
            made += self._cut(dealt, tokens)
        return made

    def _cut(self, dealt: Sequence[tuple[int, Tensor]], tokens: int) -> list[Rows]:
        """As equal as rows allow, so that none is a small rest."""
        total = sum(len(ids) for _, ids in dealt)
        count = max(1, round(total / tokens))
        batches: list[list[tuple[int, Tensor]]] = [[] for _ in range(count)]
        before = 0
        for i, ids in dealt:
            batches[before * count // total].append((i, ids))
            before += len(ids)
        return [self._ordered(batch) for batch in batches if batch]

    def _ordered(self, batch: list[tuple[int, Tensor]]) -> Rows:
        batch = sorted(batch, key=lambda row: (self.adapters[row[0]][0], len(row[1])))
        return Rows([ids for _, ids in batch], [self.adapters[i][1] for i, _ in batch])


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
    requests = len(adapters) if plan.sizes.further else len(adapters) // 2
    bulk = bulk_of(trunk, adapters, BULK_ROWS, max(1, requests))
    single = bulk_of(trunk, adapters, 1, 8 * len(adapters))
    data = plan.scratch / "served"
    register(data, trunk, full_files(trunk, len(adapters), plan.shape.ranks[0]))
    arguments = server_arguments(plan, write_trunk(plan.scratch, trunk), data)
    with trunkline(plan.scratch / "served.log", *arguments) as server:
        check_answers(server, trunk, bulk, list(FORMS))
        _measure_saturation(plan, trunk, report, server, bulk, single)
        _measure_lone(plan, trunk, report, server)
    _measure_front_end(plan, report)


def server_arguments(plan: Plan, folder: Path, data: Path) -> list[str]:
    arguments = [str(folder), "--data", str(data), "--dtype", plan.dtype_name]
    return [*arguments, "--threads", str(plan.threads)]


def mean_batch(server: Running, load: Callable[[], object]) -> float:
    """Tokens of the server's batches, on average, while `load` runs."""
    metrics = ServerMetrics()
    url = f"http://{server.host}:{server.port}/metrics"
    metrics.add(0.0, httpx.get(url).text)
    load()
    metrics.add(1.0, httpx.get(url).text)
    return metrics.means("trunkline_batch_tokens")[0][1]


def _measure_saturation(
    plan: Plan, trunk: Trunk, report: Report, server: Running, bulk: Bulk, single: Bulk
) -> None:
    sizes = plan.sizes
    loads = {form: (bulk.questions(form), BULK_CONNECTIONS) for form in FORMS}
    if sizes.further:
        loads["one row"] = (single.questions("binary"), SINGLE_CONNECTIONS)
    rates: dict[str, list[float]] = {name: [] for name in loads}

    def load(name: str) -> float:
        return on_loop(saturate(server, *loads[name]))

    # The first batches are slow ones, here too: adapters are loaded, kernels are made.
    load("binary")
    noted: list[float] = []
    tokens = mean_batch(server, lambda: noted.append(load("binary")))
    loads = {
        name: (repeated(questions, noted[0], sizes.window_s), connections)
        for name, (questions, connections) in loads.items()
    }
    batches = bulk.batches(round(tokens), BULK_CONNECTIONS)
    passes = len(loads["binary"][0]) // len(bulk.rows)
    trunk.device_thread.submit(forward_rate, trunk, batches, 1).result()
    in_process: list[float] = []
    client_s = server_s = 0.0
    for _ in range(sizes.slow_rounds):
        for name in loads:
            before = _own_cpu(), cpu_seconds(server.pid)
            rates[name].append(load(name))
            client_s += _own_cpu() - before[0]
            server_s += cpu_seconds(server.pid) - before[1]
        rate = trunk.device_thread.submit(forward_rate, trunk, batches, passes)
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


def forward_rate(trunk: Trunk, batches: Sequence[Rows], passes: int) -> float:
    """Tokens a second of forward and pooling, on the device thread."""
    began = time.perf_counter()
    for _ in range(passes):
        for rows in batches:
            trunk.embed(rows)
    tokens = passes * sum(rows.tokens for rows in batches)
    return tokens / (time.perf_counter() - began)


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _measure_lone(plan: Plan, trunk: Trunk, report: Report, server: Running) -> None:
    count = plan.sizes.lone_requests
    rows = trunk.rows([LONE_TOKENS])
    question = post("/encode", {"inputs": rows.ids[0].tolist()}, OCTETS, LONE_TOKENS)
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
        f"lone request of {LONE_TOKENS} tokens / its bare forward, p50",
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


def _measure_front_end(plan: Plan, report: Report) -> None:
    trunk = Trunk(FRONT_END.config(), plan.dtype)
    folder = write_trunk(plan.scratch / "front", trunk)
    inputs = trunk.rows([LONE_TOKENS]).ids[0].tolist()
    question = post("/encode", {"inputs": inputs}, tokens=1)  # so that rates are of requests
    with ExitStack() as stack:
        arguments = server_arguments(plan, folder, plan.scratch / "front-data")
        own = stack.enter_context(trunkline(plan.scratch / "front.log", *arguments))
        answer = on_loop(ask_one(own, question.request))
        body = plan.scratch / "answer"
        body.write_bytes(answer.body)
        module: list[str | Path] = ["loadtest.bench.bare", body, answer.header("content-type")]
        bare = stack.enter_context(running(plan.scratch / "bare.log", module))
        rates = {
            name: [on_loop(saturate(server, [question] * FRONT_WARM_UP, FRONT_CONNECTIONS))]
            for name, server in (("own", own), ("bare", bare))
        }
        per_cpu_s: dict[str, list[float]] = {"own": [], "bare": []}
        for _ in range(plan.sizes.slow_rounds):
            for name, server in (("own", own), ("bare", bare)):
                cpu, began = cpu_seconds(server.pid), time.perf_counter()
                questions = repeated([question], rates[name][-1], plan.sizes.window_s)
                rate = on_loop(saturate(server, questions, FRONT_CONNECTIONS))
                cores = (cpu_seconds(server.pid) - cpu) / (time.perf_counter() - began)
                rates[name].append(rate)
                per_cpu_s[name].append(rate / cores)
    rates = {name: values[1:] for name, values in rates.items()}
    middle = statistics.median(rates["own"]), statistics.median(rates["bare"])
    report.ratio(
        "served",
        "front end alone / bare Starlette, requests a second",
        "front_end_over_starlette",
        quotients(rates["own"], rates["bare"]),
        f"{middle[0]:,.0f} and {middle[1]:,.0f} requests/s, {FRONT_CONNECTIONS} connections",
    )
    report.ratio(
        "served",
        "the same, requests per second of the server's processor time",
        "also.front_end_per_cpu_over_starlette",
        quotients(per_cpu_s["own"], per_cpu_s["bare"]),
        "whatever the client takes",
    )
