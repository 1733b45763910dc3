"""State of the Union addresses in chunks, with their eras."""

import html
import json
import re
from pathlib import Path

from model.demo.rows import Rows, squeeze, unique

TEST_PRESIDENTS = {
    "James Monroe", "Franklin Pierce",  # 1790-1860
    "Andrew Johnson", "Chester A Arthur", "Benjamin Harrison",  # 1861-1912
    "Warren G Harding", "Herbert Hoover",  # 1913-1945
    "John F Kennedy", "Richard Nixon",  # 1946-1980
    "George Bush", "Donald J Trump",  # 1981-2021
}  # fmt: skip
ERAS = ((1790, 1860), (1861, 1912), (1913, 1945), (1946, 1980), (1981, 2021))
CHUNK_MIN, CHUNK_AIM, CHUNK_MAX = 400, 600, 1200  # characters

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
