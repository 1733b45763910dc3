"""The report of a run: one HTML file that needs nothing else.

`python -m loadtest.report RUN.json -o REPORT.html` draws a recorded run (--recording) again; with
a second recording, of an open loop, it sets the two loops side by side.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from loadtest import pictures
from loadtest.histogram import Histogram
from loadtest.outcome import PERCENTILES, Outcome

RISING = ("ramp", "steps")  # shapes that show a knee
TOP = 20  # adapters in the table
LATE_MS = 50.0  # a p99 of the generator's own delay over this puts the latencies in doubt

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2128; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p.note { color: #57606a; margin: .2rem 0 .6rem; max-width: 48rem; }
.verdict { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; color: #fff; }
.kept { background: #2c8a57; } .missed { background: #c0392b; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.tile { border: 1px solid #d8dce1; border-radius: .5rem; padding: .5rem .9rem; min-width: 7.2rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tile span { color: #57606a; font-size: .82rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .22rem .8rem .22rem 0; text-align: right; border-bottom: 1px solid #e6e8eb; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; display: block; }
"""


def write_report(outcome: Outcome, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(outcome), "utf-8")


def page(outcome: Outcome) -> str:
    summary, info = outcome.summary, outcome.info
    device = f"{info['dtype']} on {info['device']}"
    settings = outcome.settings
    load = f"{settings.rate:g} requests/s" if settings.rate else f"{outcome.profile.peak:g} users"
    sections = [
        f"<h1>Load on {escape(info['backbone']['id'])}</h1>",
        f"<p class=note>trunkline {escape(info['version'])}, {escape(device)}; {summary['loop']} "
        f"loop, {outcome.profile.name} to {load}, {summary['seconds']} s, "
        f"{_adapters(outcome)}, seed {settings.seed}</p>",
        _verdict(outcome),
        _tiles(outcome),
        *_pictures(outcome),
        "<h2>By kind of request</h2>",
        _latency_table(
            (kind, outcome.recording.latencies(kind)) for kind in outcome.recording.kinds()
        ),
        f"<h2>The {TOP} adapters most asked for</h2>",
        _latency_table(
            sorted(outcome.recording.adapters.items(), key=lambda item: -item[1].count)[:TOP]
        ),
        _faults(outcome),
        "<h2>Settings</h2>",
        _table(
            ("setting", "value"),
            [(n, v) for n, v in settings.to_json().items() if n != "key"],
        ),
    ]
    return _html(f"Load on {info['backbone']['id']}", sections)


def _adapters(outcome: Outcome) -> str:
    if outcome.settings.names:
        return f"adapters {escape(outcome.settings.names)}"
    return f"{outcome.settings.adapters:,} adapters (Zipf {outcome.settings.zipf:g})"


def _verdict(outcome: Outcome) -> str:
    if not outcome.breaches:
        return "<p><span class='verdict kept'>all objectives kept</span></p>"
    missed = "; ".join(map(escape, outcome.breaches))
    return f"<p><span class='verdict missed'>missed</span> {missed}</p>"


def _tiles(outcome: Outcome) -> str:
    summary, comparison = outcome.summary, outcome.comparison
    latency = summary["latency_ms"]
    tiles = [
        (f"{summary['requests']:,}", "requests answered"),
        (f"{summary['failed']:,}", "failed"),
        (f"{summary['wrong']:,}", "wrong answers"),
        (f"{summary['requests_per_s']:,.1f}", "requests/s"),
        (f"{summary['tokens_per_s']:,.0f}", "tokens/s"),
        *((f"{value:,.1f} ms", name) for name, value in latency.items()),
        (f"{summary['digests_judged']:,}", "digests of bare names judged"),
        (f"{summary['admin_deeds']:,}", "deeds of the admin"),
    ]
    shown = "".join(f"<div class=tile><b>{v}</b><span>{n}</span></div>" for v, n in tiles)
    notes = []
    if comparison is not None:
        far = comparison.median_to_base
        notes.append(
            f"{comparison.compared} sampled answers were asked for again alone, by digest: "
            f"{comparison.wrong} wrong, embeddings at most {comparison.worst_embedding:.2g} apart "
            f"(1 &minus; cosine), scores {comparison.worst_score:.2g} ({comparison.dtype})."
            + (f" Median distance to the trunk without the adapter: {far:.2g}." if far else "")
            + (
                " That is little: these adapters are too alike for the comparison to tell much."
                if comparison.tells_adapters_apart is False
                else ""
            )
        )
    lag = summary["lag_p99_ms"]
    if lag > LATE_MS and not outcome.settings.rate:
        notes.append(f"The load generator itself was late: p99 {lag:g} ms.")
    if outcome.settings.rate:
        notes.append(
            f"Latency is counted from the intended start; requests left the load generator up to "
            f"{lag:g} ms (p99) after it, which is part of the latency."
            + (" That is much: give it more workers." if lag > LATE_MS else "")
        )
    return f"<div class=tiles>{shown}</div>" + "".join(f"<p class=note>{n}</p>" for n in notes)


def _pictures(outcome: Outcome) -> list[str]:
    parts = [
        (
            "Latency over time",
            "Marks at the foot are deeds of the admin.",
            pictures.latency_over_time(outcome),
        ),
        (
            "Load and throughput",
            "Due: requests that were to start in that second. Answered: those that ended in it.",
            pictures.rate_over_time(outcome),
        ),
    ]
    if outcome.profile.name in RISING and len(pictures.plateau_points(outcome)) > 1:
        parts.append(
            (
                "Throughput against offered load",
                "Where answers fall behind, or latency leaves the floor, is the knee.",
                pictures.throughput_against_load(outcome),
            )
        )
    parts.append(("Latency by kind", "", pictures.latency_by_kind(outcome)))
    if any(name != "base" for name in outcome.recording.adapters):
        parts.append(("By adapter", "", pictures.adapters_by_popularity(outcome)))
    if outcome.recording.marks:
        parts.append(("Swaps", "How long each deed of the admin took.", pictures.swaps(outcome)))
    if pictures.server_series(outcome):
        parts.append(
            (
                "The server's own metrics",
                "Counters a second, histograms' means, gauges; over the same seconds.",
                pictures.server_panels(outcome),
            )
        )
    return [
        f"<h2>{title}</h2>" + (f"<p class=note>{note}</p>" if note else "") + picture
        for title, note, picture in parts
    ]


def _faults(outcome: Outcome) -> str:
    if not outcome.recording.faults:
        return ""
    rows = [(fault, f"{count:,}") for fault, count in outcome.recording.faults.most_common()]
    return "<h2>Failures</h2>" + _table(("what", "how often"), rows)


def _latency_table(rows: Iterable[tuple[str, Histogram]]) -> str:
    heads = ("", "requests", *(f"p{p:g} ms" for p in PERCENTILES))
    return _table(
        heads,
        [
            (name, f"{h.count:,}", *(f"{h.percentile(p):,.1f}" for p in PERCENTILES))
            for name, h in rows
        ],
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _html(title: str, sections: Iterable[str]) -> str:
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        f"<body>{''.join(sections)}</body></html>"
    )


def loops_page(closed: Outcome, opened: Outcome) -> str:
    """Two runs against one server, side by side."""
    rows = []
    for label, outcome in (("closed", closed), ("open", opened)):
        for point in pictures.plateau_points(outcome):
            numbers = (point["load"], point["requests_per_s"], point["p50"], point["p99"])
            rows.append((label, *(f"{n:,.1f}" for n in numbers if not math.isnan(n))))
    return _html(
        "Both loops",
        [
            "<h1>Closed and open loop</h1>",
            "<p class=note>A closed loop waits for its answers, so a server that stalls is asked "
            "less; an open loop goes on asking, and counts from when a request was due.</p>",
            pictures.loops(closed, opened),
            _table(("loop", "users or requests/s due", "answered/s", "p50 ms", "p99 ms"), rows),
        ],
    )


def _read(path: Path) -> Outcome:
    return Outcome.from_json(json.loads(path.read_text("utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("opened", type=Path, nargs="?", help="the same server in an open loop")
    parser.add_argument("-o", "--out", type=Path, default=Path("load-report.html"))
    options = parser.parse_args()
    run = _read(options.run)
    text = page(run) if options.opened is None else loops_page(run, _read(options.opened))
    options.out.write_text(text, "utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
