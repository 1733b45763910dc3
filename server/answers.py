"""Results to answers: JSON rows, raw float32, safetensors."""

import base64
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import torch
from safetensors.torch import save
from starlette.responses import Response

from adapters.versions import Version
from model.tokenizer import Tokenizer
from server.engine.errors import NonFiniteResult, TooManyInputs
from server.engine.job import Floats, Result
from server.inputs import Encoded, token_entries
from server.number_formats import DType, packed, rounded

OCTET_STREAM = "application/octet-stream"
SAFETENSORS = "application/vnd.safetensors"
METADATA_HEADER = "x-trunkline-metadata"
MAX_FACTS = 8  # adapter names of one request in the log
MAX_METADATA_BYTES = 60_000  # a header line: Python's http.client reads 65,536 bytes


class JSONAnswer(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


@dataclass(frozen=True)
class Answered:
    """One request's rows and results, inputs outermost, and where its time went."""

    rows: Sequence[Encoded]
    results: Sequence[Result]
    received: float  # time.monotonic()
    tokenize_ms: float
    values: int  # numbers in it, about

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

    def envelope(self, model: str, data: list[dict[str, Any]]) -> dict[str, Any]:
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
) -> list[dict[str, Any]]:
    """An answer's data: index, adapter, and what `fill` makes of a row or the row's own error.

    Raises NonFiniteResult where the dtype asked for can hold no row at all.
    """
    data = []
    for index, (row, result) in enumerate(zip(answered.rows, answered.results, strict=True)):
        content = _content(index, row, result, fill)
        data.append({"index": index, "adapter": adapter_entry(result.adapter)} | content)
    if all("error" in entry for entry in data):
        first = data[0]["error"]
        raise NonFiniteResult(first["message"], **first["details"])
    return data


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
        tokens = token_entries(row, tokenizer)
        entry["tokens"] = [t | {"hidden": h} for t, h in zip(tokens, result.hidden, strict=True)]
    if result.critic_logits is not None or result.sequence_score is not None:
        entry["critic"] = critic_summary(result) | {"tokens": critic_tokens(row, result)}
    if result.masks is not None:
        entry["logits"] = _mask_entries(result, tokenizer)
    if result.label_scores is not None:
        entry["labels"] = label_entries(result, None)
    return entry


def critic_row(row: Encoded, result: Result, tokenizer: Tokenizer) -> dict[str, Any]:
    """/critic's row: each token with its place in the text and its critic values."""
    pairs = zip(token_entries(row, tokenizer), critic_tokens(row, result), strict=True)
    tokens = [token | scores for token, scores in pairs]
    return critic_summary(result) | {"tokens": tokens, "truncated": row.truncated}


def critic_summary(result: Result) -> dict[str, Any]:
    """`score` is None where only a sequence head scored the row: no critic judged its tokens."""
    score = None if result.wrongness is None else float(result.wrongness.mean())
    return {"score": score, "sequence_score": result.sequence_score}


def critic_tokens(row: Encoded, result: Result) -> list[dict[str, Any]]:
    if result.critic_logits is None or result.wrongness is None:
        return [{"logit": None, "wrongness": None} for _ in row.ids]
    pairs = zip(result.critic_logits.tolist(), result.wrongness.tolist(), strict=True)
    return [{"logit": logit, "wrongness": wrongness} for logit, wrongness in pairs]


def label_entries(result: Result, top_k: int | None) -> list[dict[str, Any]]:
    """Best first; top_k None is all."""
    assert result.labels is not None
    assert result.label_scores is not None
    best = np.argsort(-result.label_scores, kind="stable")[:top_k]
    return [{"label": result.labels[i], "score": float(result.label_scores[i])} for i in best]


def _mask_entries(result: Result, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    assert result.masks is not None
    assert result.top_ids is not None
    assert result.top_logprobs is not None
    pairs = zip(result.masks, result.top_ids.tolist(), result.top_logprobs.tolist(), strict=True)
    return [
        {
            "position": position,
            "top": [
                {"id": token, "text": tokenizer.text_of(token), "logprob": logprob}
                for token, logprob in zip(ids, logprobs, strict=True)
            ],
        }
        for position, ids, logprobs in pairs
    ]


def octet_answer(answered: Answered, form: EmbeddingForm) -> Response:
    """The rows' embeddings, little-endian in the form's dtype, one after the other."""
    matrix = embedding_matrix(answered, form)
    metadata = _metadata(answered, matrix, form)
    header = orjson.dumps(metadata).decode()
    if len(header) > MAX_METADATA_BYTES:
        raise TooManyInputs(
            f"{METADATA_HEADER} would have {len(header)} bytes, more than clients read: send fewer "
            f"rows, or accept {SAFETENSORS}",
            limit=MAX_METADATA_BYTES,
        )
    headers = {METADATA_HEADER: header}
    content = packed(matrix, form.dtype)
    return Response(content, media_type=OCTET_STREAM, headers=headers)


def safetensors_answer(answered: Answered, form: EmbeddingForm) -> Response:
    """Every output under `<row>.<output>`; the metadata's values are JSON."""
    refuse_errors(answered)
    tensors: dict[str, Any] = {}
    for index, result in enumerate(answered.results):
        tensors |= {f"{index}.{name}": array for name, array in _arrays(result, form).items()}
    has_rows = answered.results[0].embedding is not None
    matrix = embedding_matrix(answered, form) if has_rows else None
    metadata = _metadata(answered, matrix, form)
    text = {name: orjson.dumps(value).decode() for name, value in metadata.items()}
    return Response(save(tensors, text), media_type=SAFETENSORS)


def _arrays(result: Result, form: EmbeddingForm) -> dict[str, Any]:
    arrays = {
        "embedding": None if result.embedding is None else form.finite(result.embedding),
        "tokens": result.hidden,
        "critic": result.critic_logits,
        "critic.wrongness": result.wrongness,
        "critic.sequence_score": _one(result.sequence_score),
        "logits": result.top_logprobs,
        "logits.ids": result.top_ids,
        "logits.positions": None if result.masks is None else np.array(result.masks, np.int64),
        "labels": result.label_scores,
    }
    tensors = {name: torch.tensor(a) for name, a in arrays.items() if a is not None}
    if "embedding" in tensors:
        tensors["embedding"] = tensors["embedding"].to(getattr(torch, form.dtype))
    return tensors


def _one(value: float | None) -> Floats | None:
    return None if value is None else np.array([value], np.float32)


def embedding_matrix(answered: Answered, form: EmbeddingForm) -> Floats:
    """(rows, dimensions) in float32. Raises NonFiniteResult for a row that has an error."""
    refuse_errors(answered)
    vectors = [form.vector(r.embedding) for r in answered.results if r.embedding is not None]
    return np.stack(vectors).astype("<f4")


def _metadata(answered: Answered, matrix: Floats | None, form: EmbeddingForm) -> dict[str, Any]:
    metadata = {
        "shape": None if matrix is None else list(matrix.shape),
        "dtype": form.dtype,
        "adapters": [adapter_entry(result.adapter) for result in answered.results],
        "usage": answered.usage,
    }
    labels = [list(r.labels) if r.labels else None for r in answered.results]
    return metadata | ({"labels": labels} if any(labels) else {})


def refuse_errors(answered: Answered) -> None:
    """A binary answer has no place for a row's error, so the request as a whole has it."""
    bad = [row for row, result in enumerate(answered.results) if result.error is not None]
    if bad:
        rows = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise NonFiniteResult(f"the result of row {rows} is not finite", row=bad[0], rows=bad[:100])
