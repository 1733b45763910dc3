"""Requests, strict: no value is converted, no unknown key passes."""

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from adapters.names import NAME_PATTERN
from server.bodies import InputFault
from server.engine.job import Ids

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


def parse_inputs(value: Any, info: ValidationInfo) -> list[str | Ids]:
    """The four shapes of `inputs` as a list of rows, in one pass. Raises InputFault.

    Too many rows are refused by their number, before any is made.
    """
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list):
        raise InputFault(
            "validation_error", "inputs must be a text, a list of ids, or a list of those"
        )
    if not value:
        raise InputFault("empty_input", "inputs is empty")
    if type(value[0]) is int:
        return [_ids(value, None)]
    for row, item in enumerate(value):
        if not isinstance(item, str | list):
            raise InputFault(
                "validation_error", "a row of inputs is neither a text nor a list of ids", row=row
            )
    limit = (info.context or {}).get("max_inputs", len(value))
    if len(value) > limit:
        sentence = f"the request has {len(value)} rows; the limit is {limit}"
        raise InputFault("too_many_inputs", sentence, limit=limit)
    return [
        _text(item, i) if isinstance(item, str) else _ids(item, i) for i, item in enumerate(value)
    ]


def _text(value: str, row: int | None = None) -> str:
    if not value:
        raise InputFault("empty_input", "a text is empty", row=row)
    return value


def _ids(value: list[Any], row: int | None) -> Ids:
    if not value:
        raise InputFault("empty_input", "a row of inputs is empty", row=row)
    if set(map(type, value)) != {int}:
        raise InputFault("validation_error", "token ids must be integers", row=row)
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError as error:
        raise InputFault("token_out_of_range", "a token id is out of any range", row=row) from error


_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_IDS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 1,
}


def _rows_schema(text: str, *rows: dict[str, Any]) -> WithJsonSchema:
    """One of `rows`, or a list of them."""
    lists = {"type": "array", "items": {"anyOf": list(rows)}, "minItems": 1}
    return WithJsonSchema({"anyOf": [*rows, lists], "description": text})


_Parsed = Annotated[list[Any], BeforeValidator(parse_inputs)]
Inputs = Annotated[
    _Parsed, _rows_schema("A text, a list of token ids, or a list of either.", _TEXT, _IDS)
]
Texts = Annotated[_Parsed, _rows_schema("A text, or a list of texts.", _TEXT)]
IdRows = Annotated[_Parsed, _rows_schema("A list of token ids, or a list of those.", _IDS)]
Reference = Annotated[
    str,
    Field(
        description="name, name@3, name@alias, name@sha256:<hex>, base",
        json_schema_extra={"pattern": REFERENCE_PATTERN},
    ),
]


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


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


class CriticRequest(InferenceRequest):
    pass


class ClassifyRequest(InferenceRequest):
    top_k: Annotated[int, Field(ge=1)] | None = None


class EmbeddingsRequest(StrictModel):
    """OpenAI's shape."""

    model: Reference
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


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
