"""Two translations of the Bible: pairs of verses, added words, documents."""

import html
import random
import re
from collections.abc import Iterator
from pathlib import Path

from pysword.modules import SwordModules

from model.demo.rows import SEED, Rows, normal, squeeze, unique

Chapters = dict[tuple[str, int], Rows]  # verses by book and chapter

# Whole books of every genre without a near-verbatim parallel in another book: Chronicles repeats
# Samuel and Kings, the first three gospels repeat each other, Jude repeats II Peter.
TEST_BOOKS = {
    "Joshua", "Ruth", "Esther", "Job", "Ecclesiastes", "Lamentations",
    "Hosea", "Jonah", "John", "I Corinthians", "Hebrews", "James",
}  # fmt: skip
# WEB prints the doxology of Romans 16:25-27 here, so the two translations do not correspond.
MISALIGNED = {"Romans 14:23"}

OPEN, CLOSE, NOTE = "\1", "\2", "\3"
INLINE = r"</?(?:w|q|seg|divineName|transChange|foreign|name|catchWord|hi)\b[^>]*>"


def strip_osis(osis: str) -> str:
    """Text of a raw OSIS verse, the added words between OPEN and CLOSE."""
    osis = re.split(r'<div [^>]*type="glossary"', osis)[0]  # appended to the last verse of WEB
    osis = re.sub(r"(?s)<note\b.*?</note>", NOTE, osis)
    osis = re.sub(r"(?s)<title\b.*?</title>", " ", osis)
    osis = re.sub(r'(?s)<transChange type="added">(.*?)</transChange>', rf"{OPEN}\1{CLOSE}", osis)
    text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(INLINE, "", osis)))
    text = re.sub(r"¶|\\\+?\w+\*?", " ", text)  # pilcrows, and a few stray \nd markers
    # A note between two words has no space of its own: without one, the words are glued.
    text = re.sub(rf"{NOTE}(?=[\w“‘({OPEN}])", " ", text).replace(NOTE, "")
    return re.sub(r"”(?=\w)", "” ", text)  # so does a closing quotation mark, now and then


def verse(osis: str) -> tuple[str, list[list[int]]]:
    """Clean text of a raw OSIS verse, and the character spans of its added words."""
    text = strip_osis(osis)
    text = re.sub(rf"{OPEN}(\s+)", rf"\1{OPEN}", text)
    text = re.sub(rf"(\s+){CLOSE}", rf"{CLOSE}\1", text)
    text = re.sub(rf"\s+(?=[{OPEN}{CLOSE}]*[,.;:?!)])", "", squeeze(text))
    plain, spans, start = "", [], 0
    for piece in re.split(rf"([{OPEN}{CLOSE}])", text):
        if piece == OPEN:
            start = len(plain)
        elif piece == CLOSE and len(plain) > start:
            spans.append([start, len(plain)])
        elif piece != CLOSE:
            plain += piece
    return plain, spans


def read_module(folder: Path, name: str) -> dict[str, dict[int, list[str]]]:
    """{book: {chapter: [raw verse, ...]}} of one SWORD module, all verses in order."""
    library = SwordModules(str(folder))
    library.parse_modules()
    bible = library.get_bible_from_module(name)
    return {
        book.name: {
            chapter: list(bible.get_iter(books=book.name, chapters=chapter, clean=False))
            for chapter in range(1, book.num_chapters + 1)
        }
        for books in bible.get_structure().get_books().values()
        for book in books
    }


def read_bibles(folder: Path) -> Chapters:
    """Verses of the 66 books both translations have, by (book, chapter), in canonical order."""
    kjv, web = read_module(folder, "engKJV2006eb"), read_module(folder, "engWEB2015eb")
    return {
        (book, chapter): [
            {"ref": f"{book} {chapter}:{n}", "kjv": k, "web": verse(w)[0], "added": spans}
            for n, (raw, w) in enumerate(zip(verses, web[book][chapter], strict=False), 1)
            for k, spans in [verse(raw)]
        ]
        for book, chapters in kjv.items()
        for chapter, verses in chapters.items()
    }


def verse_rows(chapters: Chapters, test: bool) -> Rows:
    rows = [
        row
        for (book, _), verses in chapters.items()
        for row in verses
        if (book in TEST_BOOKS) == test and row["ref"] not in MISALIGNED
    ]
    rows = [r for r in rows if r["kjv"] and r["web"] and normal(r["kjv"]) != normal(r["web"])]
    return unique(rows, "kjv", "web")


def runs(verses: list[str], rng: random.Random) -> Iterator[list[str]]:
    """Cut a chapter into runs of 3 to 6 verses (a chapter of two stays one run)."""
    while verses:
        rest = len(verses)
        sizes = [n for n in (3, 4, 5, 6) if n == rest or n + 3 <= rest] or [rest]
        size = rng.choice(sizes)
        yield verses[:size]
        verses = verses[size:]


def bible_documents(chapters: Chapters) -> Iterator[str]:
    for (book, chapter), verses in chapters.items():
        for version in ("kjv", "web"):
            rng = random.Random(f"{SEED} {version} {book} {chapter}")
            texts = [row[version] for row in verses if row[version]]
            if book not in TEST_BOOKS:
                yield from (" ".join(run) for run in runs(texts, rng))
