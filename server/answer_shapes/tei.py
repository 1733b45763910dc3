"""Answers of text-embeddings-inference's routes."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel


class Embeddings(RootModel[list[list[float]]]):
    """The pooled row of every input."""


class TokenStates(RootModel[list[list[list[float]]]]):
    """The hidden state of every token of every input."""


class Cosines(RootModel[list[float]]):
    """The cosine of the source sentence with each of the others, in their order."""


class EmbeddingsOrCosines(RootModel[list[list[float]] | list[float]]):
    """As /embed answers, or as /similarity does where the request has a source sentence."""


class Prediction(BaseModel):
    """A label of the adapter's classifier with its probability."""

    label: str
    score: float


class Predictions(RootModel[list[Prediction] | list[list[Prediction]]]):
    """The labels of the text, best first; for a batch, such a list for every row."""


class TeiError(BaseModel):
    """An error answer in text-embeddings-inference's shape, with our own fields beside it."""

    error: str = Field(description="A sentence for people. Never contains what the client sent.")
    error_type: str = Field(description="Validation, Tokenizer, Overloaded, Backend or Unhealthy.")
    code: str = Field(description="Names the fault, as in the other routes' error answers.")
    details: dict[str, Any] = Field(description="Numbers and names that belong to the fault.")
    request_id: str | None = Field(description="The same as in the x-request-id header.")


class TeiInfo(BaseModel):
    """The fields of text-embeddings-inference's GET /info; below /as/ of the path's adapter."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str = Field(description="The digest of the backbone, or of the adapter.")
    model_dtype: str
    model_type: dict[str, Any] = Field(
        description="embedding with its pooling, or classifier with its labels."
    )
    max_concurrent_requests: int | None
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    docker_label: str | None
    sha: str | None
