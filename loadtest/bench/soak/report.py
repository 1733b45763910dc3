"""What became of a soak: the slope of everything that was sampled, a picture and a summary."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from loadtest.bench.soak.samples import Sample
from loadtest.pictures import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, svg

COLOURS = (BLUE, ORANGE, GREEN, RED, VIOLET, GREY)
WINDOWS = 6  # of what comes after the warm-up: the first and the last are compared
# What may be more in the last window than in the first: this share of it, and so much besides.
SHARE, LEAST_MB, LEAST = 0.01, 1.0, 2.0


@dataclass(frozen=True)
class Trend:
    """A column after the warm-up."""

    column: str
    first: float  # median of the first window
    last: float  # median of the last
    least: float
    most: float
    slope: float  # an hour, by least squares

    @property
    def is_judged(self) -> bool:
        """Counts of what was done grow by their nature; a peak is one moment's."""
        return not self.column.startswith("count_") and self.column != "peak_mb"

    @property
    def is_flat(self) -> bool:
        absolute = LEAST_MB if self.column.endswith("_mb") else LEAST
        return self.last - self.first <= max(absolute, SHARE * self.first)


def trends(samples: Sequence[Sample], warm_s: float) -> list[Trend]:
    """A trend for each column; none if fewer than WINDOWS samples follow the warm-up."""
    after = [sample for sample in samples if sample["at_s"] >= warm_s]
    if len(after) < WINDOWS:
        return []
    hours = np.array([sample["at_s"] / 3600 for sample in after])
    size = len(after) // WINDOWS
    found = []
    for column in [name for name in after[-1] if name != "at_s"]:
        values = np.array([sample.get(column, 0.0) for sample in after])
        slope = float(np.polyfit(hours, values, 1)[0])
        first, last = median(values[:size]), median(values[-size:])
        found.append(Trend(column, first, last, values.min(), values.max(), slope))
    return found


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    columns = list(dict.fromkeys(name for sample in samples for name in sample))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({k: round(v, 3) for k, v in sample.items()} for sample in samples)


def picture(samples: Sequence[Sample], warm_s: float) -> str:
    """Memory, threads and descriptors, disk, and the registry's rows over the time."""
    panels = (
        ("MB of memory", ("rss_mb", "uss_mb")),
        ("threads and descriptors", ("threads", "descriptors")),
        ("MB of disk", _columns(samples, "disk_")),
        ("rows of the registry", _columns(samples, "rows_")),
    )

    def draw(figure: Figure) -> None:
        minutes = [sample["at_s"] / 60 for sample in samples]
        for axes, (title, columns) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            for column, colour in zip(columns, COLOURS * 3, strict=False):
                values = [sample.get(column, float("nan")) for sample in samples]
                label = column.removeprefix("disk_").removeprefix("rows_").removesuffix("_mb")
                axes.plot(minutes, values, color=colour, label=label, linewidth=1.3)
            axes.axvline(warm_s / 60, color=GREY, linestyle=":", linewidth=1)
            axes.set_title(title)
            axes.set_xlabel("minutes")
            axes.set_ylim(bottom=0)
            if columns:
                axes.legend(ncols=3, fontsize=7)

    return svg("soak", draw, 5.6)


def _columns(samples: Sequence[Sample], prefix: str) -> list[str]:
    """The columns of a prefix that are not always nearly nothing."""
    names = dict.fromkeys(name for sample in samples for name in sample if name.startswith(prefix))
    return [name for name in names if max(s.get(name, 0.0) for s in samples) >= 0.01]


def summary(
    samples: Sequence[Sample], counts: Counter[str], faults: Sequence[str], warm_s: float
) -> str:
    """The Markdown text."""
    found = trends(samples, warm_s)
    took = samples[-1]["at_s"] if samples else 0.0
    growing = [trend.column for trend in found if trend.is_judged and not trend.is_flat]
    lines = [
        f"{took / 60:.0f} minutes, {counts['uploads']:,} uploads, {counts['right']:,} answers "
        f"checked and right, {counts['wrong']} wrong, {counts['failed']} requests failed, "
        f"{counts['refused']} refused with 429 or 503, {counts['left out']} not sent because the "
        "machine was too busy.",
        "",
        f"After the first {warm_s / 60:.0f} minutes "
        + ("everything is flat." if found and not growing else f"growing: {', '.join(growing)}."),
        "",
        "| | first sixth, median | last sixth, median | least | most | slope an hour | flat |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {t.column} | {t.first:,.1f} | {t.last:,.1f} | {t.least:,.1f} | {t.most:,.1f} | "
        f"{t.slope:+,.2f} | {'yes' if t.is_flat else 'NO'} |"
        for t in found
        if t.is_judged
    ]
    lines += ["", *(f"* {fault}" for fault in faults)]
    return "\n".join(lines).rstrip() + "\n"


def is_sound(samples: Sequence[Sample], counts: Counter[str], warm_s: float) -> bool:
    """Nothing failed, nothing was wrong, and nothing grew."""
    found = trends(samples, warm_s)
    return (
        not counts["failed"]
        and not counts["wrong"]
        and all(t.is_flat for t in found if t.is_judged)
    )
