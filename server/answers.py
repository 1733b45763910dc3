"""Results to answers in JSON."""

import base64
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from adapters.versions import Version
from model.tokenizer import Tokenizer
from server.answer_size import AnswerSize
from server.engine.errors import NonFiniteResult
from server.engine.job import Floats, Result
from server.inputs import Encoded, token_entries
from server.json_pieces import Items, dumps, pieces
from server.large_answer import LargeAnswer
from server.number_formats import DType, packed, rounded

MAX_FACTS = 8  # adapter names of one request in the log
GROUP = 64  # entries of tokens or labels that are written in one call


class JSONAnswer(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def json_answer(
    size: AnswerSize, content: Any, headers: Mapping[str, str] | None = None
) -> Response:
    """The content as JSON; that of a large answer is made in pieces while it is written."""
    if size.is_large:
        return LargeAnswer(pieces(content), headers=headers)
    return JSONAnswer(content, headers=dict(headers or {}))


@dataclass(frozen=True)
class Answered:
    """One request's rows and results, inputs outermost, and where its time went."""

    rows: Sequence[Encoded]
    results: Sequence[Result]
    received: float  # time.monotonic()
    tokenize_ms: float
    size: AnswerSize

    @property
    def usage(self) -> dict[str, int]:
        tokens = sum([len(row.ids) for row in self.rows])
        return {"prompt_tokens": tokens, "total_tokens": tokens}

    @property
    def timings(self) -> dict[str, float]:
        return {
            "tokenize": round(self.tokenize_ms, 3),
            "queue": round(max([result.queue_ms for result in self.results]), 3),
            "forward": round(max([result.forward_ms for result in self.results]), 3),
            "total": round((time.monotonic() - self.received) * 1e3, 3),
        }

    def facts(self) -> dict[str, Any]:
        """For the log and the trace."""
        names = sorted({result.adapter.name for result in self.results if result.adapter})
        tokens = self.usage["total_tokens"]
        times = {f"{name}_ms": ms for name, ms in self.timings.items() if name != "total"}
        return {"rows": len(self.rows), "tokens": tokens, "adapters": names[:MAX_FACTS]} | times

    def envelope(self, model: str, data: Sequence[dict[str, Any]] | Items) -> dict[str, Any]:
        return {
            "object": "list",
            "model": model,
            "data": data,
            "usage": self.usage,
            "timings_ms": self.timings,
        }


@dataclass(frozen=True)
class EmbeddingForm:
    """How a pooled row is sent: its first `dimensions`, then L2-normalised, as list or base64."""

    dimensions: int | None = None
    normalize: bool = True
    base64: bool = False
    dtype: DType = "float32"

    def vector(self, pooled: Floats) -> Floats:
        cut = pooled[: self.dimensions]
        if not self.normalize:
            return np.ascontiguousarray(cut)
        norm = math.sqrt(np.dot(cut, cut))
        return np.ascontiguousarray(cut / norm if norm > 0 else cut)

    def finite(self, pooled: Floats) -> Floats:
        """`vector` rounded to the dtype. Raises NonFiniteResult where that cannot hold it."""
        return rounded(self.vector(pooled), self.dtype)

    def sent(self, pooled: Floats) -> Floats | str:
        """A list's numbers are rounded to the dtype; base64 holds the dtype's own bytes."""
        if self.base64:
            return base64.b64encode(packed(self.vector(pooled), self.dtype)).decode()
        return self.finite(pooled)


def adapter_entry(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    return {"name": version.name, "version": version.number, "digest": version.digest}


def data_rows(
    answered: Answered, fill: Callable[[Encoded, Result], dict[str, Any]]
) -> list[dict[str, Any]] | Items:
    """An answer's data: index, adapter, and what `fill` makes of a row or the row's own error.

    Those of a large answer are made while it is written. Raises NonFiniteResult, then too, where
    the dtype asked for can hold no row at all.
    """
    rows = _data_rows(answered, fill)
    return Items(rows) if answered.size.is_large else list(rows)


def _data_rows(
    answered: Answered, fill: Callable[[Encoded, Result], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    first, good = None, False
    for index, (row, result) in enumerate(zip(answered.rows, answered.results, strict=True)):
        content = _content(index, row, result, fill)
        first = content if first is None else first
        good = good or "error" not in content
        yield {"index": index, "adapter": adapter_entry(result.adapter)} | content
    if not good and first is not None:
        raise NonFiniteResult(first["error"]["message"], **first["error"]["details"])


def _content(
    index: int, row: Encoded, result: Result, fill: Callable[[Encoded, Result], dict[str, Any]]
) -> dict[str, Any]:
    error = result.error
    if error is None:
        try:
            return fill(row, result)
        except NonFiniteResult as found:  # this row's dtype is too small for it; others may fit
            error = found
    details = error.details | {"row": index}
    return {"error": {"code": error.code, "message": error.message, "details": details}}


def encoded_row(
    row: Encoded, result: Result, form: EmbeddingForm, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What /encode was asked for of one row."""
    entry: dict[str, Any] = {"truncated": row.truncated}
    if result.embedding is not None:
        entry["embedding"] = form.sent(result.embedding)
    if result.hidden is not None:
        tokens = zip(token_entries(row, tokenizer), result.hidden, strict=True)
        entry["tokens"] = Items((t | {"hidden": h} for t, h in tokens), GROUP)
    if result.critic_logits is not None or result.sequence_score is not None:
        entry["critic"] = critic_summary(result) | {
            "tokens": Items(critic_tokens(row, result), GROUP)
        }
    if result.masks is not None:
        entry["logits"] = Items(_mask_entries(result, tokenizer))
    if result.label_scores is not None:
        entry["labels"] = label_entries(result, None)
    return entry


def critic_row(row: Encoded, result: Result, tokenizer: Tokenizer) -> dict[str, Any]:
    """/critic's row: each token with its place in the text and its critic values."""
    pairs = zip(token_entries(row, tokenizer), critic_tokens(row, result), strict=True)
    tokens = (token | scores for token, scores in pairs)
    return critic_summary(result) | {"tokens": Items(tokens, GROUP), "truncated": row.truncated}


def critic_summary(result: Result) -> dict[str, Any]:
    """`score` is None where only a sequence head scored the row: no critic judged its tokens."""
    score = None if result.wrongness is None else float(result.wrongness.mean())
    return {"score": score, "sequence_score": result.sequence_score}


def critic_tokens(row: Encoded, result: Result) -> Iterator[dict[str, Any]]:
    if result.critic_logits is None or result.wrongness is None:
        for _ in row.ids:
            yield {"logit": None, "wrongness": None}
        return
    pairs = zip(result.critic_logits.tolist(), result.wrongness.tolist(), strict=True)
    for logit, wrongness in pairs:
        yield {"logit": logit, "wrongness": wrongness}


def label_entries(result: Result, top_k: int | None) -> Items:
    """Best first; top_k None is all."""
    assert result.labels is not None
    assert result.label_scores is not None
    best = np.argsort(-result.label_scores, kind="stable")[:top_k]
    return Items(_label_entries(result.labels, result.label_scores[best], best), GROUP)


def _label_entries(
    labels: Sequence[str], scores: Floats, order: NDArray[np.intp]
) -> Iterator[dict[str, Any]]:
    for place, score in zip(order.tolist(), scores.tolist(), strict=True):
        yield {"label": labels[place], "score": score}


def _mask_entries(result: Result, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    assert result.masks is not None
    assert result.top_ids is not None
    assert result.top_logprobs is not None
    for position, ids, logprobs in zip(
        result.masks, result.top_ids, result.top_logprobs, strict=True
    ):
        pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
        top = ({"id": i, "text": tokenizer.text_of(i), "logprob": logprob} for i, logprob in pairs)
        yield {"position": position, "top": Items(top, GROUP)}


def embedding_matrix(answered: Answered, form: EmbeddingForm) -> Floats:
    """(rows, dimensions) in float32. Raises NonFiniteResult for a row that has an error."""
    refuse_errors(answered)
    vectors = [form.vector(r.embedding) for r in answered.results if r.embedding is not None]
    return np.stack(vectors).astype("<f4")


def refuse_errors(answered: Answered) -> None:
    """A binary answer has no place for a row's error, so the request as a whole has it."""
    bad = [row for row, result in enumerate(answered.results) if result.error is not None]
    if bad:
        rows = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise NonFiniteResult(f"the result of row {rows} is not finite", row=bad[0], rows=bad[:100])
