"""The front end alone: a trunk too small to matter, beside a route of bare Starlette.

That route parses the same body and answers the same bytes; the same client loads both.
"""

import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from loadtest.bench.client import ask_one, on_loop, post, repeated, saturate
from loadtest.bench.pairs import quotients
from loadtest.bench.plan import Plan, Shape
from loadtest.bench.process import cpu_seconds, running, trunkline
from loadtest.bench.registered import server_arguments, write_trunk
from loadtest.bench.report import Report
from loadtest.bench.trunk import Trunk

SHAPE = Shape(n_embd=32, n_layer=1, n_head=1, ranks=(8,))
LONE_TOKENS = 16  # of a request
CONNECTIONS = 32
WARM_UP = 300  # requests


def measure(plan: Plan, report: Report) -> None:
    trunk = Trunk(SHAPE.config(), plan.dtype)
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
            name: [on_loop(saturate(server, [question] * WARM_UP, CONNECTIONS))]
            for name, server in (("own", own), ("bare", bare))
        }
        per_cpu_s: dict[str, list[float]] = {"own": [], "bare": []}
        for _ in range(plan.sizes.slow_rounds):
            for name, server in (("own", own), ("bare", bare)):
                cpu, began = cpu_seconds(server.pid), time.perf_counter()
                questions = repeated([question], rates[name][-1], plan.sizes.window_s)
                rate = on_loop(saturate(server, questions, CONNECTIONS))
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
        f"{middle[0]:,.0f} and {middle[1]:,.0f} requests/s, {CONNECTIONS} connections",
    )
    report.ratio(
        "served",
        "the same, requests per second of the server's processor time",
        "also.front_end_per_cpu_over_starlette",
        quotients(per_cpu_s["own"], per_cpu_s["bare"]),
        "whatever the client takes",
    )
