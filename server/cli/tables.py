"""What a person sees of the server's answers: aligned tables, sizes, local dates.

Names, metadata and labels are whatever was uploaded, so nothing of them is taken for markup, and
what does not print is shown as a mark.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from model.config import LORA_SITES

DIGEST_DIGITS = 12  # enough for a reference
PIPE_COLUMNS = 160  # where there is no terminal to ask
HISTORY = 10


def console(stderr: bool = False) -> Console:
    has_width = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    width = None if has_width else PIPE_COLUMNS
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def plain(value: Any) -> str:
    """Text on one line, safe for a terminal."""
    return "".join(c if c.isprintable() else "�" for c in str(value))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    right: Sequence[str] = (),
    fold: Sequence[str] = ("Name", "Aliases"),
) -> Table:
    """Rows under columns: those in `right` are numbers, those in `fold` give way, then the last."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        stays = column not in fold and column != columns[-1]
        justify: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=stays)
    for row in rows:
        made.add_row(*("" if cell is None else plain(cell) for cell in row))
    return made


def digest(value: str) -> str:
    return value.removeprefix("sha256:")[:DIGEST_DIGITS]


def moment(seconds: float | None) -> str:
    """Seconds since 1970 as local date and time."""
    if seconds is None:
        return "never"
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def yes(value: bool) -> str:
    return "yes" if value else ""


def spans(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5"""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def listing(body: dict[str, Any]) -> RenderableType:
    """GET /adapters."""
    if not body["data"]:
        return "no adapters"
    columns = ("Name", "Version", "Aliases", "Rank", "Size", "Digest", "Slots", "Requests", "Used")
    return table(
        columns,
        [
            (
                row["name"],
                "none" if row["version"] is None else row["version"],
                _aliases(row["aliases"]),
                row["rank"],
                decimal(row["bytes"]),
                digest(row["digest"]),
                yes(row["resident"]),
                row["requests"],
                moment(row["last_used"]).partition(" ")[0],
            )
            for row in body["data"]
        ],
        right=("Version", "Rank", "Size", "Requests"),
    )


def _aliases(aliases: dict[str, Any]) -> str:
    """Those beside `current`, which has a column of its own."""
    others = ((name, at["version"]) for name, at in aliases.items() if name != "current")
    return ", ".join(f"{name}={version}" for name, version in others)


def adapter(body: dict[str, Any]) -> RenderableType:
    """GET /adapters/{name}: pointers, versions, what the current one changes, its history."""
    parts: list[RenderableType] = [Text(plain(body["name"]), style="bold"), ""]
    parts += [_pointers(body["aliases"]), "", _versions(body["versions"])]
    numbers = [version["version"] for version in body["versions"]]
    at = numbers.index(body["version"]) if body["version"] in numbers else -1
    version = body["versions"][at]
    parts += ["", f"Version {version['version']} changes {changes(version)}"]
    if version["applied"]["lora"]:
        parts += ["", _ranks(version["applied"]["lora"])]
    parts += ["", table(("Metadata", ""), map(_shortened, sorted(version["metadata"].items())))]
    if body["audit"]:
        parts += ["", _history(body["audit"][:HISTORY])]
    return Group(*parts)


def _pointers(aliases: dict[str, Any]) -> RenderableType:
    if not aliases:
        return "no version is current"
    rows = [(name, at["version"], at["previous"], at["generation"]) for name, at in aliases.items()]
    columns = ("Alias", "Version", "Before", "Generation")
    return table(columns, rows, right=columns[1:])


def _versions(versions: Sequence[dict[str, Any]]) -> Table:
    return table(
        ("Version", "Digest", "Rank", "Size", "Probe delta", "Created", "State"),
        [
            (
                version["version"],
                digest(version["digest"]),
                version["rank"],
                decimal(version["bytes"]),
                f"{version['probe_delta']:.4g}",
                moment(version["created_at"]),
                _state(version),
            )
            for version in versions
        ],
        right=("Version", "Rank", "Size", "Probe delta"),
    )


def _state(version: dict[str, Any]) -> str:
    words = [word for word in ("damaged", "pinned") if version.get(word)]
    words += ["pin not held"] if version["pinned"] and not version["pin_held"] else []
    words += ["in slots"] if version["resident"] else []
    words += [f"{version['in_flight']} in flight"] if version["in_flight"] else []
    return ", ".join(words)


def changes(version: dict[str, Any]) -> str:
    """One line: LoRA, LayerNorms and heads."""
    applied = version["applied"]
    sites = sum(map(len, applied["lora"].values()))
    parts = []
    if sites:
        layers = spans(map(int, applied["lora"]))
        parts.append(f"{count(sites, 'site')} in layers {layers} (rank {version['rank']})")
    if applied["norms"]:
        parts.append(count(len(applied["norms"]), "LayerNorm"))
    heads = {"sequence_head": "sequence head", "cls_embedding": "CLS embedding"}
    heads = {"critic": "critic", "calibration": "calibration"} | heads
    parts += [shown for head, shown in heads.items() if applied.get(head)]
    if version["labels"]:
        parts.append(f"a classifier of {count(len(version['labels']), 'label')}")
    return ", ".join(parts) or "nothing"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _ranks(lora: dict[str, dict[str, int]]) -> Table:
    """Ranks by site, layers that are alike in one row."""
    alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for layer, ranks in lora.items():
        alike.setdefault(tuple(sorted(ranks.items())), []).append(int(layer))
    sites = [site for site in LORA_SITES if any(site in ranks for ranks in lora.values())]
    rows = [
        (spans(layers), *(dict(ranks).get(site) for site in sites))
        for ranks, layers in alike.items()
    ]
    return table(("Layers", *sites), rows, right=sites)


def _history(audit: Sequence[dict[str, Any]]) -> Table:
    rows = [(moment(e["at"]), e["who"], e["action"], _detail(e["detail"])) for e in audit]
    return table(("When", "Who", "Did", "Detail"), rows)


def _detail(detail: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in map(_shortened, detail.items()))


def _shortened(entry: tuple[str, Any]) -> tuple[str, Any]:
    key, value = entry
    return key, digest(value) if key in ("digest", "base_digest") else value


def differences(body: dict[str, Any]) -> RenderableType:
    """What `diff` found, in places and then in numbers."""
    a, b = (f"{side['name']}@{side['version']}" for side in (body["a"], body["b"]))
    if body["a"]["digest"] == body["b"]["digest"]:
        return plain(f"{a} and {b} are the same file, {digest(body['a']['digest'])}")
    apart = [place for place in body["weights"] if place["difference"] != 0]
    parts: list[RenderableType] = [_facts(body["differences"], a, b)] if body["differences"] else []
    if apart:
        parts.append(
            Group(
                "Frobenius norms of what each changes, and of the difference", _norms(apart, a, b)
            )
        )
    same = len(body["weights"]) - len(apart)
    if same:
        parts.append(f"{count(same, 'place')} changed alike, to the last bit")
    return Group(*[line for part in parts for line in (part, "")][:-1])


def _facts(found: Sequence[dict[str, Any]], a: str, b: str) -> Table:
    """A difference that layers share is one row."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for each in found:
        head, layer, tail = _split_layer(each["key"])
        key = (each["kind"], head, tail, _value(each["a"]), _value(each["b"]))
        alike.setdefault(key, []).extend(layer)
    rows = [
        (kind, f"{head}{spans(layers)}{tail}", value_a, value_b)
        for (kind, head, tail, value_a, value_b), layers in alike.items()
    ]
    return table(("What", "Where", a, b), rows, fold=(a,))


def _norms(places: Sequence[dict[str, Any]], a: str, b: str) -> Table:
    """`Relative` is to the larger one of both."""
    rows = [
        (place["key"], *(_number(place[part]) for part in ("a", "b", "difference", "relative")))
        for place in places
    ]
    columns = ("Where", a, b, "Difference", "Relative")
    return table(columns, rows, right=columns[1:], fold=(a, b))


def _number(value: float | None) -> str:
    """Four digits, with their zeros; a plain 0 is exact."""
    if value is None:
        return "-"
    return f"{value:#.4g}" if value else "0"


def _split_layer(key: str) -> tuple[str, list[int], str]:
    """transformer.h.3.ln_1 -> transformer.h., [3], .ln_1"""
    head, mark, rest = key.partition("transformer.h.")
    layer, _, tail = rest.partition(".")
    if head or not layer.isdecimal():
        return key, [], ""
    return mark, [int(layer)], f".{tail}"


def _value(value: Any) -> str:
    if value is None or value is False:
        return "-"
    return "yes" if value is True else plain(value)
