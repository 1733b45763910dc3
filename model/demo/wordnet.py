"""WordNet: definitions with their classes, and documents."""

import re
from collections import Counter, defaultdict
from pathlib import Path

from model.demo.rows import Row, Rows, digest, normal, shuffled, squeeze, unique

GLOSS_MIN = 15  # characters
TEST_GROUP_SHARE = 0.10  # of the groups of noun glosses
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
