"""Results to answers in binary: raw numbers of one dtype, and safetensors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response

from adapters.versions import Version
from server.answers import Answered, EmbeddingForm, adapter_entry, embedding_matrix, refuse_errors
from server.engine.errors import TooManyInputs
from server.engine.job import Floats, Result
from server.large_answer import LargeAnswer
from server.number_formats import DType, packed

OCTET_STREAM = "application/octet-stream"
SAFETENSORS = "application/vnd.safetensors"
METADATA_HEADER = "x-trunkline-metadata"
MAX_METADATA_BYTES = 60_000  # a header line: Python's http.client reads 65,536 bytes
_DTYPES: Mapping[DType, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 8  # bytes, of the header

_OTHER_METADATA = 200  # bytes at most, besides the adapters

Named = tuple[str, str, list[int], bytes]  # name, dtype, shape, little-endian numbers


def check_metadata(adapters: Sequence[Version | None], rows: int) -> None:
    """Raises TooManyInputs where so many rows under each of the adapters fill the header line."""
    entries = sum(len(orjson.dumps(adapter_entry(adapter))) + 1 for adapter in adapters)
    _check_metadata(entries * rows + _OTHER_METADATA)


def _check_metadata(size: int) -> None:
    if size > MAX_METADATA_BYTES:
        raise TooManyInputs(
            f"{METADATA_HEADER} would have {size} bytes, more than clients read: send fewer "
            f"rows, or accept {SAFETENSORS}",
            limit=MAX_METADATA_BYTES,
        )


def octet_answer(answered: Answered, form: EmbeddingForm) -> Response:
    """The rows' embeddings, little-endian in the form's dtype, one after the other."""
    matrix = embedding_matrix(answered, form)
    metadata = _metadata(answered, matrix, form)
    header = orjson.dumps(metadata).decode()
    _check_metadata(len(header))  # a version that came meanwhile may have a longer number
    headers = {METADATA_HEADER: header}
    content = packed(matrix, form.dtype)
    return Response(content, media_type=OCTET_STREAM, headers=headers)


def safetensors_answer(answered: Answered, form: EmbeddingForm) -> Response:
    """Every output under `<row>.<output>`; the metadata's values are JSON."""
    refuse_errors(answered)
    has_rows = answered.results[0].embedding is not None
    matrix = embedding_matrix(answered, form) if has_rows else None
    metadata = _metadata(answered, matrix, form)
    text = {name: [_escaped(orjson.dumps(value))] for name, value in metadata.items()}
    if any(result.labels for result in answered.results):
        text["labels"] = _label_lists(answered)
    tensors = [
        tensor
        for index, result in enumerate(answered.results)
        for tensor in _tensors(index, result, form)
    ]
    parts = safetensors(tensors, text)
    if answered.size.is_large:
        return LargeAnswer(parts, SAFETENSORS)
    return Response(b"".join(parts), media_type=SAFETENSORS)


def safetensors(tensors: list[Named], metadata: Mapping[str, list[bytes]]) -> Iterator[bytes]:
    """A safetensors file in pieces: the library would copy all of it in one call.

    A value of the metadata is escaped JSON in pieces. Wide numbers come first, so that all of them
    are aligned.
    """
    tensors = sorted(tensors, key=lambda tensor: tensor[1] not in ("I64", "F32"))
    tensors.sort(key=lambda tensor: tensor[1] != "I64")
    entries: dict[str, Any] = {}
    at = 0
    for name, dtype, shape, data in tensors:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    header = [b'{"__metadata__":{']
    for index, (name, value) in enumerate(metadata.items()):
        header += [b"," if index else b"", orjson.dumps(name), b':"', *value, b'"']
    header += [b"},", orjson.dumps(entries)[1:]]
    length = sum(map(len, header))
    padding = b" " * (-length % _ALIGNMENT)
    yield (length + len(padding)).to_bytes(8, "little")
    yield from (*header, padding)
    for *_, data in tensors:
        yield data


def _escaped(text: bytes) -> bytes:
    """JSON as the inside of a JSON string."""
    return orjson.dumps(text.decode())[1:-1]


def _label_lists(answered: Answered) -> list[bytes]:
    """Every row's labels, or null, as one escaped JSON list; an adapter's are escaped once."""
    known: dict[tuple[str, ...] | None, bytes] = {}
    lists = [b"["]
    for index, result in enumerate(answered.results):
        labels = result.labels or None
        if labels not in known:
            known[labels] = _escaped(orjson.dumps(labels))
        lists += [b"," if index else b"", known[labels]]
    return [*lists, b"]"]


def _tensors(index: int, result: Result, form: EmbeddingForm) -> Iterator[Named]:
    if result.embedding is not None:
        vector = form.vector(result.embedding)
        data = packed(vector, form.dtype)
        yield f"{index}.embedding", _DTYPES[form.dtype], list(vector.shape), data
    for name, array in _arrays(result).items():
        if array is None:
            continue
        wide = np.issubdtype(array.dtype, np.integer)
        data = array.astype("<i8" if wide else "<f4").tobytes()
        yield f"{index}.{name}", "I64" if wide else "F32", list(array.shape), data


def _arrays(result: Result) -> dict[str, Any]:
    return {
        "tokens": result.hidden,
        "critic": result.critic_logits,
        "critic.wrongness": result.wrongness,
        "critic.sequence_score": _one(result.sequence_score),
        "logits": result.top_logprobs,
        "logits.ids": result.top_ids,
        "logits.positions": None if result.masks is None else np.array(result.masks, np.int64),
        "labels": result.label_scores,
    }


def _one(value: float | None) -> Floats | None:
    return None if value is None else np.array([value], np.float32)


def _metadata(answered: Answered, matrix: Floats | None, form: EmbeddingForm) -> dict[str, Any]:
    return {
        "shape": None if matrix is None else list(matrix.shape),
        "dtype": form.dtype,
        "adapters": [adapter_entry(result.adapter) for result in answered.results],
        "usage": answered.usage,
    }
