"""Answers of the rerank routes."""

from typing import Any, Literal

from pydantic import BaseModel, Field, RootModel


class TextRank(BaseModel):
    """One of the `texts`, as text-embeddings-inference answers it."""

    index: int = Field(description="Its place in the request.")
    score: float = Field(description="The cosine of its pooled row with the query's.")
    text: str | None = Field(default=None, description="With return_text.")


class Reranked(BaseModel):
    """One of the `documents`."""

    index: int = Field(description="Its place in the request.")
    relevance_score: float = Field(description="The cosine of its pooled row with the query's.")
    truncated: bool = Field(description="Whether the document was cut.")
    document: dict[str, Any] | None = Field(default=None, description="With return_documents.")


class RerankUsage(BaseModel):
    """Tokens of the query and of the documents."""

    prompt_tokens: int
    total_tokens: int


class RerankAnswer(BaseModel):
    """The documents, best first."""

    id: str
    object: Literal["list"]
    model: str
    adapter: dict[str, Any] | None = Field(description="null: the backbone alone.")
    query_truncated: bool = Field(description="Whether the query was cut.")
    results: list[Reranked]
    usage: RerankUsage
    meta: dict[str, Any] = Field(description="As Cohere's clients read it.")
    timings_ms: dict[str, float]


class RerankAnswers(RootModel[RerankAnswer | list[TextRank]]):
    """`documents` get an object, `texts` a list; both best first."""
