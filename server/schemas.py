"""Requests, strict: no value is converted, no unknown key passes."""

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    FailFast,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from adapters.names import NAME_PATTERN
from server.bodies import InputFault
from server.engine.job import Ids
from server.number_formats import DType
from server.strict_model import StrictModel

REFERENCE_PATTERN = NAME_PATTERN.removesuffix("$") + "(@[a-z0-9][a-z0-9._:-]*)?$"
MAX_ADAPTERS = 256  # of one request
Output = Literal["embedding", "tokens", "critic", "logits", "labels"]
OUTPUTS = (
    "embedding: the pooled row. tokens: each token with its state. critic: how likely each token "
    "is wrong. logits: the top_k likeliest tokens at every [MASK] of the input (among ids: the "
    "mask_token_id of /info); an input without one has an empty list. labels: of the adapter's "
    "classifier, best first."
)
Pooling = Literal["mean", "cls", "last"]


class Rows(list[str | Ids]):
    """The rows of a request; `single` where it gave one row and not a list of rows."""

    single = False


def parse_inputs(value: Any, info: ValidationInfo) -> Rows:
    """The four shapes of `inputs` as a list of rows, in one pass. Raises InputFault.

    Too many rows are refused by their number, before any is made.
    """
    if isinstance(value, str):
        return _one(_text(value))
    if not isinstance(value, list):
        raise InputFault("validation_error", "must be a text, a list of ids, or a list of those")
    if not value:
        raise InputFault("empty_input", "the list is empty")
    if type(value[0]) is int:
        return _one(_ids(value, None))
    for row, item in enumerate(value):
        if not isinstance(item, str | list):
            raise InputFault("validation_error", "neither a text nor a list of ids", row=row)
    check_rows(len(value), info)
    return Rows(
        _text(item, i) if isinstance(item, str) else _ids(item, i) for i, item in enumerate(value)
    )


def parse_texts(value: Any, info: ValidationInfo) -> Rows:
    """A list of texts. Raises InputFault."""
    if not isinstance(value, list):
        raise InputFault("validation_error", "must be a list of texts")
    if not value:
        raise InputFault("empty_input", "the list is empty")
    for row, item in enumerate(value):
        if not isinstance(item, str):
            raise InputFault("validation_error", "must be a text", row=row)
    check_rows(len(value), info)
    return Rows(_text(item, row) for row, item in enumerate(value))


def check_rows(rows: int, info: ValidationInfo) -> None:
    """Raises InputFault for more rows than a request may have."""
    limit = (info.context or {}).get("max_inputs", rows)
    if rows > limit:
        sentence = f"{rows} rows are more than max_inputs, {limit}"
        raise InputFault("too_many_inputs", sentence, limit=limit, setting="max_inputs")


def _one(row: str | Ids) -> Rows:
    rows = Rows((row,))
    rows.single = True
    return rows


def _text(value: str, row: int | None = None) -> str:
    if not value:
        raise InputFault("empty_input", "the text is empty", row=row)
    return value


def _ids(value: list[Any], row: int | None) -> Ids:
    if not value:
        raise InputFault("empty_input", "the row is empty", row=row)
    if set(map(type, value)) != {int}:
        raise InputFault("validation_error", "token ids must be integers", row=row)
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError as error:
        raise InputFault("token_out_of_range", "a token id is out of any range", row=row) from error


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
IDS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 1,
}


def rows_schema(text: str, *rows: dict[str, Any]) -> WithJsonSchema:
    """One of `rows`, or a list of them."""
    lists = {"type": "array", "items": {"anyOf": list(rows)}, "minItems": 1}
    return WithJsonSchema({"anyOf": [*rows, lists], "description": text})


_Parsed = Annotated[Rows, PlainValidator(parse_inputs)]
Inputs = Annotated[
    _Parsed, rows_schema("A text, a list of token ids, or a list of either.", TEXT, IDS)
]
Texts = Annotated[_Parsed, rows_schema("A text, or a list of texts.", TEXT)]
IdRows = Annotated[_Parsed, rows_schema("A list of token ids, or a list of those.", IDS)]
Reference = Annotated[
    str,
    Field(
        description="name, name@3, name@alias, name@sha256:<hex>, base",
        json_schema_extra={"pattern": REFERENCE_PATTERN},
    ),
]


class InferenceRequest(StrictModel):
    """What /encode, /critic and /classify have in common."""

    adapter: Reference | None = None
    adapters: Annotated[list[Reference] | None, Field(min_length=1, max_length=MAX_ADAPTERS)] = None
    inputs: Inputs
    truncate: bool = False
    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] | None = None

    @model_validator(mode="after")
    def _one_kind_of_adapter(self) -> "InferenceRequest":
        if self.adapter is not None and self.adapters is not None:
            raise InputFault("validation_error", "give adapter or adapters, not both")
        return self

    @property
    def references(self) -> list[str | None]:
        return list(self.adapters) if self.adapters is not None else [self.adapter]


def _embedding_alone() -> list[Output]:
    """A list given as the default itself is copied deeply for every request."""
    return ["embedding"]


class EncodeRequest(InferenceRequest):
    outputs: Annotated[
        list[Output], Field(min_length=1, max_length=16, description=OUTPUTS), FailFast()
    ] = Field(default_factory=_embedding_alone, json_schema_extra={"default": ["embedding"]})
    pooling: Pooling | None = None
    normalize: bool = True
    dimensions: Annotated[int, Field(ge=1)] | None = None
    layer: Annotated[int, Field(ge=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    encoding_format: Literal["float", "base64"] = "float"
    dtype: DType = "float32"


class CriticRequest(InferenceRequest):
    pass


class ClassifyRequest(InferenceRequest):
    top_k: Annotated[int, Field(ge=1)] | None = None


class TokenizeRequest(StrictModel):
    inputs: Texts


class DetokenizeRequest(StrictModel):
    ids: IdRows


class AliasRequest(StrictModel):
    version: Annotated[int, Field(ge=1, le=999_999_999)]


class LoadLoraRequest(StrictModel):
    """vLLM's shape. Its fields without a meaning here change no result, so they are taken."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = False
    lora_int_id: int | None = None
    base_model_name: str | None = None
    is_3d_lora_weight: Literal[False] | None = None


class UnloadLoraRequest(StrictModel):
    """vLLM's shape."""

    lora_name: str
    lora_int_id: int | None = None
