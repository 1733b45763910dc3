"""What a person sees of an inference answer: rows of texts with what the server says of them."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from server.cli.tables import console, plain, table

Rows = Sequence[tuple[str, dict[str, Any]]]  # (text, row of the answer)

SHOWN_VALUES = 4  # of an embedding
TEXT_CHARACTERS = 60
# Wrongness from which a token has this style
STYLES = ((0.75, "bold red"), (0.5, "red"), (0.25, "yellow"))


def encoded(rows: Rows) -> RenderableType:
    """One line a row: the beginning of the embedding, the best label, the score."""
    columns = ["Text", "Adapter"]
    keys = [key for key in _CELLS if any(key in row for _, row in rows)]
    columns += [_CELLS[key][0] for key in keys]
    cells = [
        (clipped(text), adapter(row), *(_cell(key, row) for key in keys)) for text, row in rows
    ]
    return table(columns, cells, fold=("Text",))


def _cell(key: str, row: dict[str, Any]) -> str:
    return _CELLS[key][1](row[key]) if key in row else ""


def _embedding(value: list[float] | str) -> str:
    if isinstance(value, str):
        return "in the file"  # base64, for --npy
    numbers = " ".join(f"{number:.4f}" for number in value[:SHOWN_VALUES])
    return f"{numbers} ... ({len(value)})" if len(value) > SHOWN_VALUES else numbers


def _tokens(value: list[dict[str, Any]]) -> str:
    return " ".join(plain(token["text"]) for token in value)


def _logits(value: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{entry['position']}: {'/'.join(plain(top['text']) for top in entry['top'])}"
        for entry in value
    )


_CELLS = {
    "embedding": ("Embedding", _embedding),
    "critic": ("Score", lambda value: _number(value["score"])),
    "labels": ("Label", lambda value: _label(value[0]) if value else ""),
    "logits": ("At [MASK]", _logits),
    "tokens": ("Tokens", _tokens),
    "error": ("Error", lambda value: f"{value['message']} ({value['code']})"),
}


def _number(value: float | None) -> str:
    """None is what a row has without a critic: only a sequence head scored it."""
    return "none" if value is None else f"{value:.4f}"


def _label(entry: dict[str, Any]) -> str:
    return f"{plain(entry['label'])} {entry['score']:.4f}"


def classified(rows: Rows) -> RenderableType:
    """A line a label, best first; the text stands at the first of its lines."""
    lines: list[tuple[str, str, str, str]] = []
    for text, row in rows:
        if "error" in row:
            lines.append((clipped(text), adapter(row), _CELLS["error"][1](row["error"]), ""))
        for place, entry in enumerate(row.get("labels", ())):
            head = (clipped(text), adapter(row)) if place == 0 else ("", "")
            lines.append((*head, entry["label"], f"{entry['score']:.4f}"))
    return table(("Text", "Adapter", "Label", "Score"), lines, right=("Score",), fold=("Text",))


def judged(rows: Rows, threshold: float) -> RenderableType:
    """Each text with its score; doubtful tokens coloured on a terminal, else listed."""
    is_terminal = console().is_terminal
    parts: list[RenderableType] = []
    for text, row in rows:
        if "error" in row:
            parts.append(f"{clipped(text)}: {_CELLS['error'][1](row['error'])}")
            continue
        parts.append(_score(row))
        parts.append(_coloured(text, row["tokens"]) if is_terminal else plain(text))
        if not is_terminal:
            parts += _listed(row["tokens"], threshold)
        parts.append("")
    return Group(*parts[:-1] if parts and parts[-1] == "" else parts)


def _score(row: dict[str, Any]) -> str:
    name = adapter(row) or "backbone"
    sequence = row["sequence_score"]
    tail = "" if sequence is None else f", sequence score {sequence:.4f}"
    return f"{name}: score {_number(row['score'])}{tail}"


def _coloured(text: str, tokens: Iterable[dict[str, Any]]) -> Text:
    """The text, each token in the style of its wrongness; by its offsets in the text."""
    shown, end = Text(), 0
    for token in tokens:
        if token["start"] is None or token["start"] < end:
            continue
        shown.append(plain(text[end : token["start"]]))
        shown.append(plain(text[token["start"] : token["end"]]), style_of(token["wrongness"]))
        end = token["end"]
    shown.append(plain(text[end:]))
    return shown


def style_of(wrongness: float | None) -> str:
    return next((style for least, style in STYLES if wrongness and wrongness >= least), "")


def _listed(tokens: Iterable[dict[str, Any]], threshold: float) -> list[RenderableType]:
    with_values = [token for token in tokens if token["wrongness"] is not None]
    if not with_values:
        return ["no critic judged the tokens"]
    doubtful = [token for token in with_values if token["wrongness"] >= threshold]
    if not doubtful:
        return ["no token is doubtful"]
    lines = [(t["text"], t["start"], f"{t['wrongness']:.4f}") for t in doubtful]
    return [table(("Token", "At", "Wrongness"), lines, right=("At", "Wrongness"), fold=())]


def adapter(row: dict[str, Any]) -> str:
    entry = row.get("adapter")
    return "" if entry is None else f"{entry['name']}@{entry['version']}"


def clipped(text: str) -> str:
    shown = plain(text)
    return shown if len(shown) <= TEXT_CHARACTERS else f"{shown[: TEXT_CHARACTERS - 3]}..."
