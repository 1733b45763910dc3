"""Overload: what a server does between half and three times the load that it can sustain.

    python -m loadtest.bench.overload [--window 6] [--rounds 3] [--pairs 60] [--together]
        [--out overload]

A server of its own (the bench's small trunk, ADAPTERS adapters and the trunk alone, rows of
mixed lengths, two API keys) is asked by an open loop with Poisson arrivals: a request is sent when
it is due, whatever became of those before. First what a closed loop sustains; then each of FACTORS
times that, in every round in another order; then ENOUGH and MOST times that by turns without a
pause, so that whatever else the machine does meets both; then one key that floods beside another,
and one adapter beside others (fairness.py). The generator has a core for itself and the server the
others, unless they are to be `--together` on all.

Writes OUT.md, a table a part, and OUT.svg and OUT-fairness.svg. Times are the client's, from when a
request was due. Goodput is what is answered with 200 while the load lasts and the queue is full:
neither before it is, nor after the load's end, when it only empties.
"""

import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure

from loadtest.bench import fairness
from loadtest.bench.client import (
    Question,
    arrivals,
    on_loop,
    open_loop,
    repeated,
    saturate,
    steady,
)
from loadtest.bench.offered import Point, Span, merged, point, questions, table
from loadtest.bench.plan import QUICK, SHAPES, Plan
from loadtest.bench.process import Running, on_cores, trunkline
from loadtest.bench.registered import full_files, name_of, register, server_arguments, write_trunk
from loadtest.bench.trunk import Trunk
from loadtest.pictures import BLUE, GREEN, ORANGE, RED, svg
from model.precision import choose_device, choose_dtype
from server.keys import new_key

ADAPTERS = 8
CONNECTIONS = 160
CLOSED_S = 0.25  # of work, that a closed loop has under way
FIRST_CONNECTIONS = 16  # while the server meets its first batches
FACTORS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
ENOUGH, MOST = 1.5, 3.0  # by turns
TURN_S, FILL_S = 2.0, 3.0
PARTS = 6  # of the turns, to see how far one can trust them


@dataclass(frozen=True)
class Measured:
    connections: int  # of the closed loop
    sustained: float
    curve: list[Point]
    turns: list[tuple[float, float]]  # goodput at ENOUGH and at MOST times it
    fairness: fairness.Fairness


def measure(
    server: Running,
    trunk: Trunk,
    keys: Sequence[str],
    window_s: float,
    factors: Sequence[float],
    rounds: int,
    pairs: int,
    connections: int,
) -> Measured:
    names = [None, *map(name_of, range(ADAPTERS))]
    asked = questions(trunk, keys[0], 0, names)
    rate = on_loop(saturate(server, asked * 2, min(connections, FIRST_CONNECTIONS)))
    # On a slow machine so many at once would be an overload of their own: a closed loop's requests
    # come to stand in the line that is asked most, which may have a ninth of the device.
    connections = min(connections, max(FIRST_CONNECTIONS, round(CLOSED_S * rate)))
    rate = on_loop(saturate(server, repeated(asked, rate, window_s), connections))
    curves = [
        _round(server, asked, rate, window_s, factors, random.Random(number))
        for number in range(rounds)
    ]
    return Measured(
        connections,
        rate,
        [merged(points) for points in zip(*curves, strict=True)],
        by_turns(server, asked, rate, TURN_S, pairs),
        fairness.measure(server, trunk, keys, names, rate, window_s),
    )


def _round(
    server: Running,
    asked: Sequence[Question],
    rate: float,
    window_s: float,
    factors: Sequence[float],
    dice: random.Random,
) -> list[Point]:
    """A point a factor, measured in any order."""
    span, points = Span.of(window_s), {}
    for factor in dice.sample(factors, len(factors)):
        sent = on_loop(steady(server, asked, factor * rate, span.ends_s, dice.randrange(1 << 30)))
        points[factor] = point(f"{factor:g}", sent, span)
    return [points[factor] for factor in factors]


def by_turns(
    server: Running, asked: Sequence[Question], rate: float, turn_s: float, pairs: int
) -> list[tuple[float, float]]:
    """Goodput at ENOUGH and at MOST times `rate`, turn after turn; the queue stays full.

    Of each turn the last three quarters count.
    """
    dice = random.Random(0)
    begins = [FILL_S + turn_s * number for number in range(2 * pairs)]
    dues = [arrivals(MOST * rate, 0, FILL_S, dice)]
    dues += [
        arrivals(factor * rate, at, at + turn_s, dice)
        for at, factor in zip(begins, cycle((ENOUGH, MOST)), strict=False)
    ]
    sent = on_loop(open_loop(server, asked, chain.from_iterable(dues), dice))
    good = [point("", sent, Span(at + turn_s / 4, at + turn_s)).good for at in begins]
    return list(zip(good[::2], good[1::2], strict=True))


def _over_enough(pairs: Sequence[tuple[float, float]]) -> float:
    """Goodput at MOST over that at ENOUGH, of all these turns."""
    return sum(most for _, most in pairs) / sum(enough for enough, _ in pairs)


def cores() -> tuple[list[int], list[int]]:
    """The server's and the generator's, which is the last; none where there are not two."""
    if not hasattr(os, "sched_getaffinity"):
        return [], []
    *others, last = sorted(os.sched_getaffinity(0))
    return (others, [last]) if others else ([], [])


def run(
    window_s: float,
    factors: Sequence[float],
    rounds: int = 1,
    pairs: int = 1,
    together: bool = False,
    connections: int = CONNECTIONS,
    settings: Sequence[str] = (),
) -> Measured:
    """On a server of its own, with two keys and `settings` as flags of `trunkline serve`."""
    dtype = choose_dtype("auto", choose_device("cpu"))
    with tempfile.TemporaryDirectory(prefix="trunkline-overload-") as scratch:
        plan = Plan("small", SHAPES["small"], "auto", dtype, 0, QUICK, Path(scratch), None)
        trunk = Trunk(plan.shape.config(), dtype)
        folder = write_trunk(plan.scratch / "trunk", trunk)
        data = plan.scratch / "data"
        register(data, trunk, full_files(trunk, ADAPTERS, plan.shape.ranks[0]))
        keys = [
            new_key(data / "keys.json", name, scopes=frozenset({"infer"}))[1]
            for name in ("loud", "quiet")
        ]
        flags = [*server_arguments(plan, folder, data), *settings]
        own, rest = ([], []) if together else cores()
        with trunkline(plan.scratch / "log", *flags, cores=own) as server, on_cores(rest):
            return measure(server, trunk, keys, window_s, factors, rounds, pairs, connections)


def picture(measured: Measured) -> str:
    """Goodput and refusals against what is offered; latency against the same."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        offered = [each.offered for each in measured.curve]
        left.plot(
            offered, [each.good for each in measured.curve], "o-", color=GREEN, label="answered"
        )
        refused = [each.offered * (1 - each.answered) for each in measured.curve]
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
@click.option("--window", default=6.0, help="Seconds of each load that count.")
@click.option("--rounds", default=3, help="How often each load is offered.")
@click.option("--pairs", default=60, help=f"Pairs of turns of {TURN_S:g} s.")
@click.option("--together", is_flag=True, help="Server and generator share all cores.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("overload"))
def main(window: float, rounds: int, pairs: int, together: bool, out: Path) -> None:
    torch.manual_seed(0)
    measured = run(window, FACTORS, rounds, pairs, together)
    peak = max(each.good for each in measured.curve)
    parts = [_over_enough(measured.turns[start::PARTS]) for start in range(min(PARTS, pairs))]
    text = "\n".join(
        [
            f"Sustained by a closed loop of {measured.connections}: "
            f"{measured.sustained:.0f} requests/s.\n",
            table(
                measured.curve,
                "times the sustained",
                "of the peak",
                [f"{each.good / peak:.2f}" for each in measured.curve],
            ),
            f"By turns of {TURN_S:g} s, goodput at {MOST:g} times over that at {ENOUGH:g}: "
            f"{_over_enough(measured.turns):.2f} of {pairs} pairs; {min(parts):.2f} to "
            f"{max(parts):.2f} in {len(parts)} parts of them.\n",
            *fairness.tables(measured.fairness),
        ]
    )
    out.with_suffix(".md").write_text(text, "utf-8")
    out.with_suffix(".svg").write_text(picture(measured), "utf-8")
    beside = out.with_name(f"{out.stem}-fairness.svg")
    beside.write_text(fairness.picture(measured.fairness), "utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
