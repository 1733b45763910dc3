"""Answers under /v1 in OpenAI's shapes."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from server.answer_shapes.inference import FailedRow


class Embedded(BaseModel):
    """The pooled row of one input."""

    object: Literal["embedding"]
    index: int
    adapter: dict[str, Any] | None = Field(
        description="name, version and digest of the adapter; null: the backbone alone."
    )
    embedding: list[float] | str = Field(
        description="Numbers, or with encoding_format base64 their bytes in embed_dtype."
    )
    truncated: bool = Field(description="Whether the input was cut.")


class EmbeddingsUsage(BaseModel):
    """Tokens of the request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """A row for every input."""

    id: str
    object: Literal["list"]
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The model that the request or its path named.")
    data: list[Embedded | FailedRow]
    usage: EmbeddingsUsage
    timings_ms: dict[str, float]


class Model(BaseModel):
    """An adapter, or the backbone."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Seconds since 1970.")
    owned_by: str


class Models(BaseModel):
    """The backbone and every adapter that the key may use."""

    object: Literal["list"]
    data: list[Model]
