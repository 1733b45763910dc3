"""Overload: what a server does between half and three times the load that it can sustain.

    python -m loadtest.bench.overload [--window 12] [--out overload]

A server of its own (the bench's small trunk, ADAPTERS adapters and the trunk alone, rows of
mixed lengths, two API keys) is asked by an open loop with Poisson arrivals: a request is sent when
it is due, whatever became of those before. First what a closed loop sustains; then each of FACTORS
times that; then, at 2 times, with one key that floods beside one that asks for a tenth of the
sustainable. Writes OUT.md, a table a part, and OUT.svg. Times are the client's, from when a request
was due; goodput is requests answered with 200 within their deadline.
"""

import math
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure

from loadtest.bench.client import Answer, Question, on_loop, post, repeated, saturate, steady
from loadtest.bench.plan import QUICK, SHAPES, Plan
from loadtest.bench.process import Running, trunkline
from loadtest.bench.registered import full_files, name_of, register, server_arguments, write_trunk
from loadtest.bench.trunk import Trunk, mixed_lengths
from loadtest.pictures import BLUE, GREEN, ORANGE, RED, svg
from server.engine.engine import choose_device, choose_dtype
from server.keys import new_key

ADAPTERS = 8
TEXTS = 96
CONNECTIONS = 160
FIRST_CONNECTIONS = 16  # while the server meets its first batches
FACTORS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
QUIET_SHARE = 0.1  # of the sustainable load, of the key that does not flood
DEADLINE_MS = 10_000


@dataclass(frozen=True)
class Point:
    """One load: how much was offered and what became of it. Rates are requests a second."""

    name: str
    offered: float
    good: float
    statuses: Counter[int]
    refused_without_time: int  # 503 and 429 without a Retry-After
    latencies: Sequence[float]  # s, of the answered, sorted

    def percentile(self, percent: float) -> float:
        """NaN where nothing was answered."""
        if not self.latencies:
            return math.nan
        return self.latencies[
            min(len(self.latencies) - 1, int(len(self.latencies) * percent / 100))
        ]


def point(name: str, answers: Sequence[tuple[int, Answer, float]], window_s: float) -> Point:
    good = sorted(seconds for _, answer, seconds in answers if answer.status == 200)
    refused = [answer for _, answer, _ in answers if answer.status in (429, 503)]
    untimed = [answer for answer in refused if b"retry-after:" not in answer.head.lower()]
    return Point(
        name,
        len(answers) / window_s,
        len(good) / window_s,
        Counter(answer.status for _, answer, _ in answers),
        len(untimed),
        good,
    )


def questions(trunk: Trunk, key: str, seed: int) -> list[Question]:
    """Rows of mixed lengths, each under an adapter or the trunk, as one key sends them."""
    dice = random.Random(seed)
    asked = []
    for length in mixed_lengths(TEXTS * 400, seed)[:TEXTS]:
        ids = [dice.randrange(trunk.config.vocab_size) for _ in range(length)]
        name = dice.choice([None, *map(name_of, range(ADAPTERS))])
        body = {"adapter": name, "inputs": ids, "timeout_ms": DEADLINE_MS}
        # tokens=1: rates are of requests
        asked.append(post("/encode", body, "application/octet-stream", 1, key))
    return asked


@dataclass(frozen=True)
class Measured:
    sustained: float
    curve: list[Point]
    flooding: list[Point]


def measure(
    server: Running,
    trunk: Trunk,
    keys: Sequence[str],
    window_s: float,
    factors: Sequence[float],
    connections: int,
) -> Measured:
    loud, quiet = (questions(trunk, key, seed) for seed, key in enumerate(keys))
    rate = on_loop(saturate(server, loud * 2, min(connections, FIRST_CONNECTIONS)))
    rate = on_loop(saturate(server, repeated(loud, rate, window_s), connections))
    curve = []
    for number, factor in enumerate(factors):
        answers = on_loop(steady(server, loud, factor * rate, window_s, number))
        curve.append(point(f"{factor:g}", answers, window_s))

    return Measured(rate, curve, flooding(server, rate, loud, quiet, window_s))


def flooding(
    server: Running,
    rate: float,
    loud: Sequence[Question],
    quiet: Sequence[Question],
    window_s: float,
) -> list[Point]:
    """One key asks twice the sustainable, another a tenth of it; a point each."""
    share = QUIET_SHARE / (2 + QUIET_SHARE)
    asked = [*loud, *quiet]
    weights = [(1 - share) / len(loud)] * len(loud) + [share / len(quiet)] * len(quiet)
    mix = random.Random(0).choices(range(len(asked)), weights, k=4000)
    mixed = [asked[index] for index in mix]
    answers = on_loop(steady(server, mixed, (2 + QUIET_SHARE) * rate, window_s, seed=7))
    by_key = [
        [each for each in answers if (mix[each[0]] < len(loud)) == floods]
        for floods in (True, False)
    ]
    names = ("floods, 2 times", "asks for a tenth")
    return [point(name, found, window_s) for name, found in zip(names, by_key, strict=True)]


def run(
    window_s: float,
    factors: Sequence[float],
    shape: str = "small",
    connections: int = CONNECTIONS,
    settings: Sequence[str] = (),
) -> Measured:
    """On a server of its own, with two keys and `settings` as flags of `trunkline serve`."""
    dtype = choose_dtype("auto", choose_device("cpu"))
    with tempfile.TemporaryDirectory(prefix="trunkline-overload-") as scratch:
        plan = Plan(shape, SHAPES[shape], "auto", dtype, 0, QUICK, Path(scratch), None)
        trunk = Trunk(plan.shape.config(), dtype)
        folder = write_trunk(plan.scratch / "trunk", trunk)
        data = plan.scratch / "data"
        register(data, trunk, full_files(trunk, ADAPTERS, plan.shape.ranks[0]))
        keys = [
            new_key(data / "keys.json", name, scopes=frozenset({"infer"}))[1]
            for name in ("loud", "quiet")
        ]
        flags = [*server_arguments(plan, folder, data), *settings]
        with trunkline(plan.scratch / "log", *flags) as server:
            return measure(server, trunk, keys, window_s, factors, connections)


def table(points: Sequence[Point], first: str) -> str:
    peak = max(each.good for each in points)
    lines = [
        f"| {first} | offered/s | answered/s | of the peak | refused | p50 | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in points:
        refused = ", ".join(
            f"{count} × {status}"
            for status, count in sorted(each.statuses.items())
            if status != 200
        )
        lines.append(
            f"| {each.name} | {each.offered:.0f} | {each.good:.0f} | {each.good / peak:.2f} "
            f"| {refused or 'none'} | {each.percentile(50):.2f} s | {each.percentile(99):.2f} s |"
        )
    return "\n".join(lines) + "\n"


def picture(measured: Measured) -> str:
    """Goodput and refusals against what is offered; latency against the same."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        offered = [each.offered for each in measured.curve]
        left.plot(
            offered, [each.good for each in measured.curve], "o-", color=GREEN, label="answered"
        )
        refused = [each.offered - each.good for each in measured.curve]
        left.plot(offered, refused, "o-", color=RED, label="refused")
        left.axvline(measured.sustained, color=BLUE, linestyle=":", label="sustained, closed loop")
        left.set_ylabel("requests/s")
        for percent, colour in ((50, BLUE), (99, ORANGE)):
            values = [each.percentile(percent) for each in measured.curve]
            right.plot(offered, values, "o-", color=colour, label=f"p{percent} of the answered")
        right.set_ylabel("s, from when it was due")
        for axes in (left, right):
            axes.set_xlabel("requests offered a second")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.legend()

    return svg("overload", draw)


@click.command()
@click.option("--window", default=12.0, help="Seconds of each load.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("overload"))
def main(window: float, out: Path) -> None:
    torch.manual_seed(0)
    measured = run(window, FACTORS)
    text = "\n".join(
        [
            f"Sustained by a closed loop of {CONNECTIONS}: {measured.sustained:.0f} requests/s.\n",
            table(measured.curve, "times the sustained"),
            table(measured.flooding, "key"),
        ]
    )
    out.with_suffix(".md").write_text(text, "utf-8")
    out.with_suffix(".svg").write_text(picture(measured), "utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
