"""Overload: what a server does between half and three times the load that it can sustain.

    python -m loadtest.bench.overload [--window 12] [--out overload]

A server of its own (the bench's small trunk, ADAPTERS adapters and the trunk alone, rows of
mixed lengths, two API keys) is asked by an open loop with Poisson arrivals: a request is sent when
it is due, whatever became of those before. First what a closed loop sustains; then each of FACTORS
times that; then one key that floods beside another, and one adapter beside others (fairness.py).
Writes OUT.md, a table a part, and OUT.svg and OUT-fairness.svg. Times are the client's, from when a
request was due; goodput is requests answered with 200 within their deadline.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure

from loadtest.bench import fairness
from loadtest.bench.client import on_loop, repeated, saturate, steady
from loadtest.bench.offered import Point, point, questions, table
from loadtest.bench.plan import QUICK, SHAPES, Plan
from loadtest.bench.process import Running, trunkline
from loadtest.bench.registered import full_files, name_of, register, server_arguments, write_trunk
from loadtest.bench.trunk import Trunk
from loadtest.pictures import BLUE, GREEN, ORANGE, RED, svg
from server.engine.engine import choose_device, choose_dtype
from server.keys import new_key

ADAPTERS = 8
CONNECTIONS = 160
FIRST_CONNECTIONS = 16  # while the server meets its first batches
FACTORS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Measured:
    connections: int  # of the closed loop
    sustained: float
    curve: list[Point]
    fairness: fairness.Fairness


def measure(
    server: Running,
    trunk: Trunk,
    keys: Sequence[str],
    window_s: float,
    factors: Sequence[float],
    connections: int,
) -> Measured:
    names = [None, *map(name_of, range(ADAPTERS))]
    asked = questions(trunk, keys[0], 0, names)
    rate = on_loop(saturate(server, asked * 2, min(connections, FIRST_CONNECTIONS)))
    # On a slow machine so many at once would be an overload of their own: a second's worth is none.
    connections = min(connections, max(FIRST_CONNECTIONS, round(rate)))
    rate = on_loop(saturate(server, repeated(asked, rate, window_s), connections))
    curve = []
    for number, factor in enumerate(factors):
        answers = on_loop(steady(server, asked, factor * rate, window_s, number))
        curve.append(point(f"{factor:g}", answers, window_s))
    fair = fairness.measure(server, trunk, keys, names, rate, window_s)
    return Measured(connections, rate, curve, fair)


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
            f"Sustained by a closed loop of {measured.connections}: "
            f"{measured.sustained:.0f} requests/s.\n",
            table(measured.curve, "times the sustained"),
            table(measured.fairness.keys, "key"),
            table(measured.fairness.adapters, "adapter"),
        ]
    )
    out.with_suffix(".md").write_text(text, "utf-8")
    out.with_suffix(".svg").write_text(picture(measured), "utf-8")
    beside = out.with_name(f"{out.stem}-fairness.svg")
    beside.write_text(fairness.picture(measured.fairness), "utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
