"""The report's pictures: each a function from a finished run to an SVG."""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.histogram import Histogram, merged
from loadtest.outcome import Outcome
from loadtest.recording import Recording

WIDTH = 9.2  # inches
BINS = 120  # at most, over the time
BLUE, ORANGE, GREEN, RED, GREY, VIOLET = (
    "#2563a8",
    "#d9730d",
    "#2c8a57",
    "#c0392b",
    "#8a9099",
    "#7a4fb5",
)
PERCENTILES = ((50, GREEN), (90, BLUE), (99, ORANGE))
MARKS = {"push": BLUE, "promote": GREEN, "roll back": VIOLET, "unload": GREY, "load": GREY}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.edgecolor": "#9aa1a9",
    "legend.frameon": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
}


def svg(name: str, draw: Callable[[Figure], None], height: float = 3.0) -> str:
    """What `draw` makes of an empty figure, as an SVG element."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):  # ids of one page must not clash
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a font that is not there is replaced
            figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def bins_of(outcome: Outcome) -> list[tuple[float, float]]:
    """The run's seconds in at most BINS pieces of whole seconds."""
    end = max([*outcome.recording.seconds, 0]) + 1
    width = max(1, math.ceil(end / BINS))
    return [(at, at + width) for at in range(0, end, width)]


def latency_over_time(outcome: Outcome) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        spans = bins_of(outcome)
        pieces = [outcome.recording.between(*span) for span in spans]
        for percent, colour in PERCENTILES:
            points = [
                ((a + b) / 2, _all(piece.latencies).percentile(percent))
                for (a, b), piece in zip(spans, pieces, strict=True)
                if piece.latencies
            ]
            axes.plot(*_columns(points), color=colour, label=f"p{percent}", linewidth=1.4)
        _log_ms(axes)
        _mark(axes, outcome.recording)
        axes.set_xlabel("seconds from the beginning, where the request was meant to start")
        axes.legend(ncols=7, loc="upper left", bbox_to_anchor=(0, 1.16))

    return svg("latency", draw, 3.4)


def rate_over_time(outcome: Outcome) -> str:
    def draw(figure: Figure) -> None:
        axes, tokens = figure.subplots(1, 2)
        spans = bins_of(outcome)
        pieces = [outcome.recording.between(*span) for span in spans]
        at = [(a + b) / 2 for a, b in spans]
        width = [b - a for a, b in spans]
        for label, colour, values in (
            ("due", GREY, [piece.due for piece in pieces]),
            ("answered", BLUE, [piece.done for piece in pieces]),
            ("failed", RED, [piece.failed for piece in pieces]),
        ):
            rates = [value / w for value, w in zip(values, width, strict=True)]
            axes.plot(at, rates, color=colour, label=label, linewidth=1.4)
        axes.set_title("requests a second")
        axes.legend(ncols=3)
        axes.set_ylim(bottom=0)
        rates = [piece.tokens / w for piece, w in zip(pieces, width, strict=True)]
        tokens.plot(at, rates, color=GREEN, linewidth=1.4)
        tokens.set_title("tokens answered a second")
        tokens.set_ylim(bottom=0)
        for each in (axes, tokens):
            each.set_xlabel("seconds")

    return svg("rate", draw)


def throughput_against_load(outcome: Outcome) -> str:
    """A point a plateau of the profile; where they leave the line is the knee."""
    points = plateau_points(outcome)
    is_open = outcome.settings.rate > 0

    def draw(figure: Figure) -> None:
        done, latency = figure.subplots(1, 2)
        loads = [point["load"] for point in points]
        if is_open:
            done.plot(loads, loads, color=GREY, linewidth=1, linestyle="--", label="all answered")
        rates = [point["requests_per_s"] for point in points]
        done.plot(loads, rates, "o-", color=BLUE, label="answered")
        done.set_title("requests answered a second")
        done.set_ylim(bottom=0)
        done.legend()
        for percent, colour in PERCENTILES:
            values = [point[f"p{percent}"] for point in points]
            latency.plot(loads, values, "o-", color=colour, label=f"p{percent}")
        _log_ms(latency)
        latency.set_title("latency")
        latency.legend(ncols=3)
        for axes in (done, latency):
            axes.set_xlabel("requests a second due" if is_open else "users")
            axes.set_xlim(left=0)

    return svg("load", draw)


def plateau_points(outcome: Outcome) -> list[dict[str, float]]:
    """Load, throughput and percentiles of each plateau, without its first part, which settles."""
    points = []
    for plateau in outcome.profile.plateaus():
        begins = plateau.begins + 0.2 * (plateau.ends - plateau.begins)
        piece = outcome.recording.between(math.ceil(begins), math.floor(plateau.ends))
        seconds = math.floor(plateau.ends) - math.ceil(begins)
        if seconds < 1 or not piece.latencies:
            continue
        histogram = _all(piece.latencies)
        points.append(
            {
                "load": piece.due / seconds if outcome.settings.rate else plateau.level,
                "requests_per_s": piece.done / seconds,
                "tokens_per_s": piece.tokens / seconds,
                **{f"p{p}": histogram.percentile(p) for p, _ in PERCENTILES},
            }
        )
    return points


def latency_by_kind(outcome: Outcome) -> str:
    """Percentile curves: how rare is how slow."""
    percents = [0, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.99]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for kind in outcome.recording.kinds():
            histogram = outcome.recording.latencies(kind)
            # A percentile that not one request stands behind says nothing
            shown = [p for p in percents if histogram.count * (100 - p) / 100 >= 1]
            rarity = [1 / (1 - p / 100) for p in shown]
            values = [histogram.percentile(p) for p in shown]
            axes.plot(rarity, values, label=f"{kind} ({histogram.count:,})", linewidth=1.4)
        axes.set_xscale("log")
        ticks = [p for p in (0, 50, 90, 99, 99.9, 99.99) if p < 100]
        axes.set_xticks([1 / (1 - p / 100) for p in ticks], [f"{p:g} %" for p in ticks])
        axes.minorticks_off()
        _log_ms(axes)
        axes.set_xlabel("of the requests are as fast or faster")
        axes.legend(ncols=3)

    return svg("kinds", draw)


def adapters_by_popularity(outcome: Outcome) -> str:
    named = {name: h for name, h in outcome.recording.adapters.items() if name != "base"}
    ranked = sorted(named.values(), key=lambda histogram: -histogram.count)

    def draw(figure: Figure) -> None:
        counts, latency = figure.subplots(1, 2)
        ranks = range(1, len(ranked) + 1)
        counts.plot(ranks, [h.count for h in ranked], ".", color=BLUE, markersize=4)
        counts.set_yscale("log")
        counts.set_title(f"requests of each of {len(ranked):,} adapters asked for")
        latency.plot(
            ranks, [h.percentile(99) for h in ranked], ".", color=ORANGE, markersize=4, label="p99"
        )
        latency.plot(
            ranks, [h.percentile(50) for h in ranked], ".", color=GREEN, markersize=4, label="p50"
        )
        _log_ms(latency)
        latency.set_title("latency")
        latency.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
        for axes in (counts, latency):
            axes.set_xlabel("adapters, the most asked for first")
            if len(ranked) > 30:
                axes.set_xscale("log")

    return svg("adapters", draw)


def swaps(outcome: Outcome) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for action in sorted({mark.action for mark in outcome.recording.marks}):
            marks = [m for m in outcome.recording.marks if m.action == action]
            points = [(mark.at, mark.ms) for mark in marks]
            axes.plot(
                *_columns(points), "o", label=action, markersize=4, color=MARKS.get(action, GREY)
            )
        failed = [(mark.at, mark.ms) for mark in outcome.recording.marks if mark.fault]
        if failed:
            axes.plot(*_columns(failed), "x", color=RED, markersize=8, label="failed")
        _log_ms(axes)
        axes.set_xlabel("seconds")
        axes.legend(ncols=6, loc="upper left", bbox_to_anchor=(0, 1.2))

    return svg("swaps", draw, 2.6)


def server_series(outcome: Outcome) -> list[tuple[str, list[tuple[float, float]]]]:
    """The server's metrics that moved, each as a rate, a mean or a value over time."""
    metrics, shown = outcome.metrics, []
    for family, kind in sorted(metrics.kinds.items()):
        if kind == "counter" and f"{family}_total" in metrics.values:
            shown.append((f"{family} / s", metrics.rates(f"{family}_total")))
        elif kind == "histogram" and f"{family}_count" in metrics.values:
            shown.append((f"{family}, mean", metrics.means(family)))
        elif kind == "gauge" and family in metrics.values:
            points = list(zip(metrics.times, metrics.values[family], strict=True))
            shown.append((family, points))
    return [(name, points) for name, points in shown if any(value for _, value in points)]


def server_panels(outcome: Outcome) -> str:
    series = server_series(outcome)
    columns = 3
    rows = math.ceil(len(series) / columns)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, (name, points) in zip(panels.flat, series, strict=False):
            axes.plot(*_columns(points), color=BLUE, linewidth=1.2)
            axes.set_title(name.removeprefix("trunkline_"), fontsize=8)
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=7)
        for axes in panels.flat[len(series) :]:
            axes.set_visible(False)

    return svg("server", draw, 1.5 * rows)


def loops(closed: Outcome, opened: Outcome) -> str:
    """One server under both loops: p50 and p99 against the requests it answered a second."""

    def draw(figure: Figure) -> None:
        for axes, percent in zip(figure.subplots(1, 2), (50, 99), strict=True):
            for outcome, colour, label in (
                (closed, BLUE, "closed loop"),
                (opened, ORANGE, "open loop, from the intended start"),
            ):
                points = plateau_points(outcome)
                axes.plot(
                    [point["requests_per_s"] for point in points],
                    [point[f"p{percent}"] for point in points],
                    "o-",
                    color=colour,
                    label=label,
                )
            _log_ms(axes)
            axes.set_title(f"p{percent}")
            axes.set_xlabel("requests answered a second")
            axes.set_xlim(left=0)
            axes.legend()

    return svg("loops", draw)


def _all(latencies: Mapping[str, Histogram]) -> Histogram:
    return merged(list(latencies.values()))


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _log_ms(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
    low, high = axes.get_ylim()
    if high / low < 20:  # less than a decade and a bit: the decades alone would be one tick
        axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def _mark(axes: Axes, recording: Recording) -> None:
    """A line a swap, in its action's colour, above the axis."""
    for action in ("push", "promote", "roll back", "unload"):
        at = [mark.at for mark in recording.marks if mark.action == action]
        if at:
            low, high = axes.get_ylim()
            axes.vlines(
                at, low, low * (high / low) ** 0.07, color=MARKS[action], linewidth=1, label=action
            )
            axes.set_ylim(low, high)
