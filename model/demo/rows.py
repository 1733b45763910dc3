"""Rows of the demo's data: normal forms, uniqueness, an order that is a hash's."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, TypeVar

Row = dict[str, Any]
Rows = list[Row]
T = TypeVar("T")

SEED = "demo-encoder-1"


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
