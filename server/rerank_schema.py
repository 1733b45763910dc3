"""The body of the rerank routes: Cohere's, Jina's, vLLM's, and text-embeddings-inference's."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PlainValidator, ValidationInfo, WithJsonSchema, model_validator

from server.bodies import InputFault, has_infinity
from server.openai_schema import NO_EFFECT, TruncateTokens
from server.schemas import Reference, Rows, check_rows, parse_texts
from server.strict_model import Elsewhere, StrictModel
from server.tei_schema import Direction

_TEXTS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "string", "minLength": 1},
    "minItems": 1,
}
_DOCUMENT: dict[str, Any] = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 1}},
    "required": ["text"],
}
_COSINE = "a score is the cosine of the pooled rows"


class Documents(NamedTuple):
    """The texts that are scored, and the documents as they were sent."""

    texts: Rows
    sent: list[Any]


def _parse_documents(value: Any, info: ValidationInfo) -> Documents:
    """Texts, or objects with a text. Raises InputFault."""
    if not isinstance(value, list):
        raise InputFault("validation_error", "must be a list")
    check_rows(len(value), info)
    for row, item in enumerate(value):
        if isinstance(item, dict) and not isinstance(item.get("text"), str):
            raise InputFault("validation_error", "the object has no text", row=row)
        if isinstance(item, dict) and has_infinity(item):
            raise InputFault("non_finite_number", "a number is not finite", row=row)
    texts = [item["text"] if isinstance(item, dict) else item for item in value]
    return Documents(parse_texts(texts, info), value)


def _parse_query(value: Any) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputFault("validation_error", "must be a text")
    if not text:
        raise InputFault("empty_input", "the text is empty")
    return text


Query = Annotated[
    str,
    PlainValidator(_parse_query),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, _DOCUMENT]}),
]


class RerankRequest(StrictModel):
    """`documents` answers {"results": [...]}; `texts` answers a list, as TEI does."""

    elsewhere: ClassVar = NO_EFFECT | {
        "rank_fields": Elsewhere((["text"],), "a document's text is ranked"),
        "max_chunks_per_doc": Elsewhere((), "a document is one row: use max_tokens_per_doc"),
        "use_activation": Elsewhere((), _COSINE),
        "activation": Elsewhere((), _COSINE),
        "softmax": Elsewhere((False,), _COSINE),
        "return_embeddings": Elsewhere((False,), "POST /v1/embeddings answers embeddings"),
    }

    model: Reference | None = None
    adapter: Reference | None = None
    query: Query
    documents: (
        Annotated[
            Documents,
            PlainValidator(_parse_documents),
            WithJsonSchema(_TEXTS | {"items": {"anyOf": [_TEXTS["items"], _DOCUMENT]}}),
        ]
        | None
    ) = None
    texts: Annotated[Rows, PlainValidator(parse_texts), WithJsonSchema(_TEXTS)] | None = None
    top_n: Annotated[int, Field(ge=0, description="The best so many; 0 is all.")] | None = None
    return_documents: bool = False
    return_text: bool = False
    raw_scores: Annotated[
        bool, Field(description="Changes nothing: the cosine is the raw score.")
    ] = False
    truncate: bool = False
    truncation_direction: Direction = "right"
    truncation_side: Literal["left", "right"] | None = None
    truncate_prompt_tokens: TruncateTokens | None = None
    max_tokens_per_doc: (
        Annotated[int, Field(ge=1, description="Cut each document to this many tokens.")] | None
    ) = None
    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "RerankRequest":
        if (self.documents is None) == (self.texts is None):
            raise InputFault(
                "validation_error", "give documents or texts, one of the two", field="documents"
            )
        if self.model is not None and self.adapter not in (None, self.model):
            raise InputFault("validation_error", "model names another adapter", field="adapter")
        return self

    @property
    def rows(self) -> Rows:
        if self.documents is not None:
            return self.documents.texts
        assert self.texts is not None
        return self.texts
