"""Flood: one API key floods a server over many adapters, and a second key asks for little.

    python -m loadtest.bench.flood [--window 8] [--together] [--slots 0] [--out fairness]

A server of its own (a narrow trunk, 201 adapters, two API keys) is asked by the quiet key for
QUIET_SHARE of what the server can do one request after another, at most MOST_QUIET requests a
second, of one row each, under an adapter that no one else asks for: first alone, then while the
other key floods over each number of adapters in ADAPTERS, in both WAYS:

* 24 connections, each of which sends its next request as soon as it has an answer, or a refusal;
* one request of ROWS rows after another, each over all of the adapters at once (a fan-out).

The quiet key is to be refused nothing, and its p99 is to be at most its p99 alone and four batch
times. A batch time is the mean of trunkline_forward_seconds during the same flood.

Writes OUT.md, the table, and OUT.svg. Latencies are the client's, from when a request was due.
"""

import asyncio
import itertools
import math
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure

from loadtest.bench.client import Connection, Question, Sent, ask_one, get, on_loop, open_loop, post
from loadtest.bench.offered import DEADLINE_MS
from loadtest.bench.overload import cores
from loadtest.bench.plan import QUICK, Plan, Shape
from loadtest.bench.process import Running, on_cores, trunkline
from loadtest.bench.registered import full_files, name_of, register, server_arguments, write_trunk
from loadtest.bench.trunk import Trunk
from loadtest.pictures import BLUE, GREY, ORANGE, svg
from model.precision import choose_device, choose_dtype
from server.keys import new_key

ADAPTERS = (1, 16, 64, 200)
QUIET_ADAPTER = 200  # its number
CONNECTIONS, FAN_OUT = "24 connections", "fan-out requests"
WAYS = (CONNECTIONS, FAN_OUT)
FLOODING = {CONNECTIONS: 24, FAN_OUT: 1}  # connections
QUIET_SHARE = 0.1  # far below the half that is the key's part beside one other
MOST_QUIET, FEWEST_QUIET = 20.0, 1.0  # requests a second
SHAPE = Shape(128, 2, 4, (8,))  # narrow: the queue is what is measured, not the device
TOKENS = 64  # of a row
ROWS = {CONNECTIONS: 32, FAN_OUT: 2048}  # of a flooding request
FILL_S = 2.0  # before what counts
BATCHES = 4  # batch times that the flood may cost the quiet key


@dataclass(frozen=True)
class Case:
    """The quiet key beside one flood; times in seconds."""

    way: str
    adapters: int
    statuses: Counter[int]  # the quiet key's
    latencies: Sequence[float]  # of its answered, sorted
    batch_s: float  # mean
    flood: Counter[int]  # statuses of the flooding requests, before and while
    tokens_per_s: float  # that the device ran, of both keys

    @property
    def p99(self) -> float:
        return percentile(self.latencies, 99)


@dataclass(frozen=True)
class Measured:
    alone: Sequence[float]  # s, sorted
    cases: list[Case]

    def bound(self, case: Case) -> float:
        return percentile(self.alone, 99) + BATCHES * case.batch_s


def percentile(ascending: Sequence[float], percent: float) -> float:
    """NaN where nothing was answered."""
    if not ascending:
        return math.nan
    return ascending[min(len(ascending) - 1, int(len(ascending) * percent / 100))]


def measure(
    server: Running,
    trunk: Trunk,
    keys: Sequence[str],
    window_s: float,
    adapters: Sequence[int],
    ways: Sequence[str],
) -> Measured:
    loud, quiet, metrics_key = keys
    asked = [_question(trunk, quiet, [QUIET_ADAPTER], 1, seed) for seed in range(16)]
    _load(server, trunk, loud, max(adapters))
    on_loop(_quiet(server, asked, FEWEST_QUIET, 5.0))  # its first batches
    began = time.monotonic()
    for each in asked:
        on_loop(ask_one(server, each.request))
    one_s = (time.monotonic() - began) / len(asked)
    rate = min(MOST_QUIET, max(FEWEST_QUIET, QUIET_SHARE / one_s))
    sent = on_loop(_quiet(server, asked, rate, window_s))
    alone = sorted(each.seconds for each in sent)
    cases = [
        on_loop(_beside(server, metrics_key, asked, rate, flood, way, count, window_s))
        for way, count in itertools.product(ways, adapters)
        for flood in [_flood(trunk, loud, way, count)]
    ]
    return Measured(alone, cases)


def _load(server: Running, trunk: Trunk, key: str, adapters: int) -> None:
    """Ask each adapter once, so that it is resident where there are slots enough."""
    on_loop(ask_one(server, _question(trunk, key, range(adapters), 1, 0).request))


def _flood(trunk: Trunk, key: str, way: str, adapters: int) -> list[Question]:
    """The flooding requests, to be sent round and round."""
    rows = ROWS[way]
    if way == CONNECTIONS:
        return [_question(trunk, key, [number], rows, number) for number in range(adapters)]
    return [_question(trunk, key, range(adapters), rows // adapters, 0)]


def _question(trunk: Trunk, key: str, adapters: Sequence[int], rows: int, seed: int) -> Question:
    dice = random.Random(seed)
    inputs = [[dice.randrange(trunk.config.vocab_size) for _ in range(TOKENS)] for _ in range(rows)]
    names = [name_of(number) for number in adapters]
    body = {"adapters": names, "inputs": inputs, "timeout_ms": 3 * DEADLINE_MS}
    return post("/encode", body, "application/vnd.safetensors", TOKENS * rows * len(names), key)


async def _quiet(
    server: Running, asked: Sequence[Question], rate: float, window_s: float
) -> list[Sent]:
    """An open loop at an even rate."""
    dues = [number / rate for number in range(round(window_s * rate))]
    return await open_loop(server, asked, dues, random.Random(0))


async def _beside(
    server: Running,
    metrics_key: str,
    asked: Sequence[Question],
    rate: float,
    flood: Sequence[Question],
    way: str,
    adapters: int,
    window_s: float,
) -> Case:
    statuses: Counter[int] = Counter()
    following = itertools.cycle(flood)

    async def keep_asking() -> None:
        connection = await Connection.open(server)
        try:
            while True:
                statuses[(await connection.ask(next(following).request)).status] += 1
        finally:
            connection.close()

    tasks = [asyncio.create_task(keep_asking()) for _ in range(FLOODING[way])]
    await asyncio.sleep(FILL_S)
    before = await _batches(server, metrics_key)
    sent = await _quiet(server, asked, rate, window_s)
    batches, seconds, tokens = (
        b - a for a, b in zip(before, await _batches(server, metrics_key), strict=True)
    )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Case(
        way,
        adapters,
        Counter(each.answer.status for each in sent),
        sorted(each.seconds for each in sent if each.answer.status == 200),
        seconds / batches if batches else window_s,  # one batch took longer than all of it
        statuses,
        tokens / window_s,
    )


async def _batches(server: Running, key: str) -> tuple[float, float, float]:
    """Batches so far, their seconds, and their tokens."""
    text = (await ask_one(server, get("/metrics", key))).body.decode()
    names = ("forward_seconds_count", "forward_seconds_sum", "tokens_total")
    count, seconds, tokens = (_value(text, f"trunkline_{name}") for name in names)
    return count, seconds, tokens


def _value(text: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"/metrics has no {name}"
    return float(found[1])


def run(
    window_s: float,
    adapters: Sequence[int] = ADAPTERS,
    ways: Sequence[str] = WAYS,
    together: bool = False,
    settings: Sequence[str] = (),
) -> Measured:
    """On a server of its own, with `settings` as flags of `trunkline serve`."""
    dtype = choose_dtype("auto", choose_device("cpu"))
    with tempfile.TemporaryDirectory(prefix="trunkline-flood-") as scratch:
        plan = Plan("narrow", SHAPE, "auto", dtype, 0, QUICK, Path(scratch), None)
        trunk = Trunk(plan.shape.config(), dtype)
        folder = write_trunk(plan.scratch / "trunk", trunk)
        data = plan.scratch / "data"
        register(data, trunk, full_files(trunk, QUIET_ADAPTER + 1, plan.shape.ranks[0]))
        keys = [
            new_key(data / "keys.json", name, scopes=frozenset({scope}))[1]
            for name, scope in (("loud", "infer"), ("quiet", "infer"), ("metrics", "metrics"))
        ]
        flags = [*server_arguments(plan, folder, data), *settings]
        own, rest = ([], []) if together else cores()
        with trunkline(plan.scratch / "log", *flags, cores=own) as server, on_cores(rest):
            return measure(server, trunk, keys, window_s, adapters, ways)


def table(measured: Measured) -> str:
    """A row for each flood."""
    alone = measured.alone
    lines = [
        f"The quiet key alone, {len(alone)} requests: p50 {1e3 * percentile(alone, 50):.0f} ms, "
        f"p99 {1e3 * percentile(alone, 99):.0f} ms.\n",
        "| flood | over adapters | its answers | device, tokens/s | a batch "
        "| quiet key: answered, refused | p50 | p99 | may be |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in measured.cases:
        flood = ", ".join(f"{count} × {status}" for status, count in sorted(case.flood.items()))
        refused = case.statuses.total() - case.statuses[200]
        lines.append(
            f"| {case.way} | {case.adapters} | {flood or 'none yet'} | {case.tokens_per_s:.0f} "
            f"| {1e3 * case.batch_s:.0f} ms | {case.statuses[200]}, {refused or 'none'} "
            f"| {1e3 * percentile(case.latencies, 50):.0f} ms | {1e3 * case.p99:.0f} ms "
            f"| {1e3 * measured.bound(case):.0f} ms |"
        )
    return "\n".join(lines) + "\n"


def picture(measured: Measured) -> str:
    """The quiet key's p50 and p99 beside each flood, against what its p99 may be."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(WAYS), sharey=True)
        for axes, way in zip(panels, WAYS, strict=True):
            cases = [case for case in measured.cases if case.way == way]
            places = range(len(cases))
            bounds = [1e3 * measured.bound(case) for case in cases]
            axes.bar(places, bounds, 0.8, color=GREY, alpha=0.35, label="p99 may be")
            for percent, colour, shift in ((50, BLUE, -0.18), (99, ORANGE, 0.18)):
                values = [1e3 * percentile(case.latencies, percent) for case in cases]
                at = [place + shift for place in places]
                bars = axes.bar(at, values, 0.34, color=colour, label=f"p{percent}")
                axes.bar_label(bars, fmt="%.0f", fontsize=8)
            axes.axhline(1e3 * percentile(measured.alone, 99), color="black", linestyle=":")
            axes.set_title(f"beside a flood by {way}; dotted: p99 alone")
            axes.set_xticks(places, [str(case.adapters) for case in cases])
            axes.set_xlabel("adapters that the flood is spread over")
            axes.grid(visible=False, axis="x")
        panels[0].set_ylabel("ms, the quiet key")
        panels[0].legend(ncols=3, loc="upper left")

    return svg("flood", draw, 3.4)


@click.command()
@click.option("--window", default=8.0, help="Seconds of each flood that count.")
@click.option("--together", is_flag=True, help="Server and generator share all cores.")
@click.option("--slots", default=0, help="Adapters resident at once; 0: all.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("fairness"))
def main(window: float, together: bool, slots: int, out: Path) -> None:
    torch.manual_seed(0)
    measured = run(window, together=together, settings=["--slots", str(slots)])
    text = table(measured)
    out.with_suffix(".md").write_text(text, "utf-8")
    out.with_suffix(".svg").write_text(picture(measured), "utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
