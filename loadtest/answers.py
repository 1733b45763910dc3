"""An answer against its question: rows, digests, and values to compare with a reference."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from loadtest.questions import Question, Text


@dataclass(frozen=True)
class Sample:
    """One row as it was answered under load, to be asked for again alone."""

    kind: str
    text: Text
    name: str | None
    digest: str | None
    values: list[float]


@dataclass(frozen=True)
class Verdict:
    """fault None: the answer is what was asked for, as far as that is known yet.

    served: (name, digest) of the rows asked for by a bare name, to be judged by the Timeline.
    """

    fault: str | None = None
    tokens: int = 0
    served: Sequence[tuple[str, str]] = ()
    sample: Sample | None = None


def check(question: Question, status: int, content: bytes) -> Verdict:
    if status != 200:
        return Verdict(error_code(status, content))
    try:
        return _check_rows(question, orjson.loads(content))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return Verdict(f"wrong: the answer can't be read ({type(error).__name__})")


def error_code(status: int, content: bytes) -> str:
    """`503 overloaded`; status 0 is no answer at all."""
    if status == 0:
        return "no answer"
    try:
        return f"{status} {orjson.loads(content)['error']['code']}"
    except (KeyError, TypeError, ValueError):
        return str(status)


def _check_rows(question: Question, answer: dict[str, Any]) -> Verdict:
    rows = answer["data"]
    if len(rows) != len(question.references):
        return Verdict(f"wrong: {len(rows)} rows for {len(question.references)}")
    served = []
    for row, reference in zip(rows, question.references, strict=True):
        if "error" in row:
            return Verdict(f"row {row['error']['code']}")
        adapter = row["adapter"] or {"name": None, "digest": None}
        if adapter["name"] != reference.name:
            return Verdict(f"wrong: {adapter['name']} answered for {reference.name}")
        if reference.digest is not None and adapter["digest"] != reference.digest:
            return Verdict("wrong: the digest answered is not the digest asked for")
        if reference.name is not None and reference.digest is None:
            served.append((reference.name, adapter["digest"]))
    values = values_of(question.kind, rows[0])
    if not all(map(math.isfinite, values)):
        return Verdict("wrong: values that are not finite")
    sample = None
    if question.sampled:
        adapter = rows[0]["adapter"] or {"name": None, "digest": None}
        sample = Sample(
            question.kind, question.texts[0], adapter["name"], adapter["digest"], values
        )
    return Verdict(None, answer["usage"]["total_tokens"], served, sample)


def values_of(kind: str, row: dict[str, Any]) -> list[float]:
    """What is compared of a row: the embedding, the mean wrongness, or the labels' scores."""
    if kind == "critic":
        return [row["score"]]
    if kind == "classify":
        return [label["score"] for label in sorted(row["labels"], key=lambda x: str(x["label"]))]
    embedding = row["embedding"]
    if isinstance(embedding, str):
        return [float(x) for x in np.frombuffer(base64.b64decode(embedding), "<f4")]
    return [float(x) for x in embedding]
