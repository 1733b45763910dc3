"""The rows that the demo's trunk and adapter sets are trained and measured on.

    python -m model.demo.tasks SOURCE OUT

SOURCE is the folder of model/demo/build.py; OUT gets corpus.txt (long documents cut at sentence
ends) and {task}_train.jsonl and {task}_test.jsonl for each of the five adapter sets.
"""

import json
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

PIECE = 1600  # characters: fewer than 512 tokens
WORD = re.compile(r"[^\W\d_][\w’'-]*")
NAME = re.compile(r"(?<=[a-z,;] )[A-Z][\w’'-]*")  # capitalised inside a sentence

Rows = list[dict[str, Any]]


def pieces(document: str) -> Iterator[str]:
    """The document in pieces of at most PIECE characters, unless one sentence is longer."""
    piece = ""
    for sentence in re.split(r"(?<=[.!?;:])\s+", document):
        if piece and len(piece) + 1 + len(sentence) > PIECE:
            yield piece
            piece = ""
        piece = f"{piece} {sentence}".strip()
    yield piece


def names_of(rows: Rows) -> set[str]:
    """Words seen capitalised after a lower-case letter or a comma, in either translation."""
    found = {name for row in rows for side in ("kjv", "web") for name in NAME.findall(row[side])}
    return found - {"I"}


def without_names(row: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Both texts of a pair of verses without the names."""

    def strip(text: str) -> str:
        bare = WORD.sub(lambda word: "" if word[0] in names else word[0], text)
        return re.sub(r"\s+", " ", bare).strip()

    return {side: strip(row[side]) for side in ("kjv", "web")}


def has_words(row: dict[str, Any]) -> bool:
    return all(re.search(r"\w", row[side]) for side in ("kjv", "web"))


def tables(source: Path) -> Iterator[tuple[str, Rows]]:
    """File stem and rows. Every second training pair of verses has lost its names."""
    for task in ("supersense", "era"):
        for part in ("train", "test"):
            rows = read(source / f"{task}_{part}.jsonl.xz")
            yield f"{task}_{part}", [{"text": r["text"], "label": r["label"]} for r in rows]
    train, test = (read(source / f"verses_{part}.jsonl.xz") for part in ("train", "test"))
    names = names_of(train + test)
    pairs = [without_names(r, names) if i % 2 else r for i, r in enumerate(train)]
    yield "verses_train", [{"kjv": r["kjv"], "web": r["web"]} for r in pairs if has_words(r)]
    yield "verses_test", [{"kjv": r["kjv"], "web": r["web"]} for r in test]
    yield "verses_hard_test", [r for r in (without_names(r, names) for r in test) if has_words(r)]
    for part, rows in (("train", train), ("test", test)):
        yield f"translators_{part}", [{"kjv": r["kjv"], "added": r["added"]} for r in rows]
        yield f"scripture_{part}", [{"text": r[side]} for r in rows for side in ("kjv", "web")]


def read(path: Path) -> Rows:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with lzma.open(source / "corpus.txt.xz", "rt", encoding="utf-8") as documents:
        write(out / "corpus.txt", (p for d in documents for p in pieces(d.rstrip("\n"))))
    for stem, rows in tables(source):
        write(out / f"{stem}.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))


if __name__ == "__main__":
    main()
