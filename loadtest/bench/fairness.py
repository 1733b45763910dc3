"""Fairness: one key, or one adapter, floods a server beside others that ask for little."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.bench.client import Question, on_loop, steady
from loadtest.bench.offered import Point, Span, point, questions, table
from loadtest.bench.process import Running
from loadtest.bench.registered import name_of
from loadtest.bench.trunk import Trunk
from loadtest.pictures import BLUE, GREEN, ORANGE, RED, svg

FLOOD, LITTLE = 2.0, 0.1  # times the sustainable load
QUIET_ADAPTERS = 3
MIXED = 4000  # questions, dealt to the askers by how much each asks


@dataclass(frozen=True)
class Asker:
    name: str
    times: float  # the sustainable load
    questions: Sequence[Question]


@dataclass(frozen=True)
class Fairness:
    """A point an asker, who floods first."""

    keys: list[Point]
    adapters: list[Point]


def measure(
    server: Running,
    trunk: Trunk,
    keys: Sequence[str],
    names: Sequence[str | None],
    rate: float,
    window_s: float,
) -> Fairness:
    """Two keys over the same adapters, then adapters under one key. `rate` is the sustainable."""
    flood, little = "floods, 2 times", "asks for a tenth"
    loud, quiet = (questions(trunk, key, seed, names) for seed, key in enumerate(keys))
    of_keys = [Asker(flood, FLOOD, loud), Asker(little, LITTLE, quiet)]
    hot, *others = (
        questions(trunk, keys[0], number, [name_of(number)]) for number in range(1 + QUIET_ADAPTERS)
    )
    of_adapters = [Asker(flood, FLOOD, hot)]
    of_adapters += [
        Asker(f"another, a tenth ({n})", LITTLE, each) for n, each in enumerate(others, 1)
    ]
    return Fairness(
        ask_at_once(server, of_keys, rate, window_s),
        ask_at_once(server, of_adapters, rate, window_s),
    )


def ask_at_once(
    server: Running, askers: Sequence[Asker], rate: float, window_s: float
) -> list[Point]:
    """All of them in one open loop; a point each."""
    total = sum(asker.times for asker in askers)
    asked = [
        (number, asker.questions[index % len(asker.questions)])
        for number, asker in enumerate(askers)
        for index in range(round(MIXED * asker.times / total))
    ]
    mixed = [question for _, question in asked]
    span = Span.of(window_s)
    sent = on_loop(steady(server, mixed, total * rate, span.ends_s, seed=7))
    return [
        point(asker.name, [each for each in sent if asked[each.index][0] == number], span)
        for number, asker in enumerate(askers)
    ]


def tables(measured: Fairness) -> list[str]:
    """One of the keys, one of the adapters."""
    return [
        table(points, noun, "of them", [f"{each.answered:.0%}" for each in points])
        for noun, points in (("key", measured.keys), ("adapter", measured.adapters))
    ]


def picture(measured: Fairness) -> str:
    """A row a part: which share of what each asked for was answered, and how long that took."""
    parts = [("key", measured.keys), ("adapter", measured.adapters)]

    def draw(figure: Figure) -> None:
        heights = [len(points) for _, points in parts]
        rows = figure.subplots(len(parts), 2, sharex="col", height_ratios=heights)
        for (left, right), (noun, points) in zip(rows, parts, strict=True):
            _shares(left, points)
            left.set_title(f"one {noun} floods: what became of the requests")
            _latencies(right, points)
            right.set_title("how long the answered took")
        rows[-1][1].set_xlabel("s, from when it was due")
        for axes in rows[0]:
            axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1.14))

    return svg("fairness", draw, 4.6)


def _shares(axes: Axes, points: Sequence[Point]) -> None:
    answered = [100 * each.answered for each in points]
    places = range(len(points))
    axes.barh(places, answered, 0.6, color=GREEN, label="answered")
    rest = [100 - share for share in answered]
    axes.barh(places, rest, 0.6, answered, color=RED, label="refused or late")
    for place, each in enumerate(points):
        text = f"{each.good:.0f} of {each.offered:.0f} a second"
        axes.text(2, place, text, va="center", color="white")
    axes.set_yticks(places, [each.name for each in points])
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter("{x:.0f} %")
    _rows_from_above(axes)


def _latencies(axes: Axes, points: Sequence[Point]) -> None:
    for percent, colour, shift in ((50, BLUE, -0.17), (99, ORANGE, 0.17)):
        values = [each.percentile(percent) for each in points]
        places = [place + shift for place in range(len(points))]
        bars = axes.barh(places, values, 0.32, color=colour, label=f"p{percent}")
        axes.bar_label(bars, fmt=" %.2f s", fontsize=8)
    axes.set_yticks(range(len(points)), [""] * len(points))
    axes.margins(x=0.15)
    _rows_from_above(axes)


def _rows_from_above(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
