"""Bodies of text-embeddings-inference's routes, as its clients and huggingface_hub send them."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from server.bodies import InputFault
from server.schemas import (
    IDS,
    TEXT,
    Inputs,
    Reference,
    Rows,
    parse_inputs,
    parse_texts,
    rows_schema,
)
from server.strict_model import IGNORED, Elsewhere, StrictModel

NO_PROMPTS = "the trunk has no prompts, so it would change nothing: leave it out"


def _lower_case(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Direction = Annotated[
    Literal["left", "right"],
    BeforeValidator(_lower_case),
    Field(description="Which end is cut off: Left or Right."),
    WithJsonSchema({"type": "string", "enum": ["Left", "Right", "left", "right"]}),
]


class TeiRequest(StrictModel):
    """What the routes have in common."""

    elsewhere: ClassVar = {
        "prompt_name": Elsewhere((), NO_PROMPTS),
        "options": IGNORED,
        "encoding_format": Elsewhere(("float",), "POST /v1/embeddings takes it"),
        "add_special_tokens": Elsewhere((True,), "POST /v1/embeddings takes it"),
    }
    nested: ClassVar = "parameters"

    parameters: (
        Annotated[dict[str, Any], Field(description="huggingface_hub puts the options in here.")]
        | None
    ) = None
    adapter: Reference | None = None
    truncate: bool = False
    truncation_direction: Direction = "right"
    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] | None = None


class PooledRequest(TeiRequest):
    elsewhere: ClassVar = TeiRequest.elsewhere | {
        "top_k": Elsewhere((), "POST /predict classifies"),
        "function_to_apply": Elsewhere((), "POST /predict classifies"),
    }

    normalize: bool = True
    dimensions: Annotated[int, Field(ge=1)] | None = None


class EmbedRequest(PooledRequest):
    inputs: Inputs


class EmbedAllRequest(TeiRequest):
    elsewhere: ClassVar = TeiRequest.elsewhere | {"normalize": IGNORED}  # as in the original

    inputs: Inputs


class Sentences(NamedTuple):
    """One sentence, and those that it is compared with."""

    source_sentence: str
    sentences: Rows


def _source(value: Any) -> str:
    if not isinstance(value, str):
        raise InputFault("validation_error", "must be a text")
    if not value:
        raise InputFault("empty_input", "the text is empty")
    return value


def _parse_sentences(value: Any, info: ValidationInfo) -> Sentences:
    """{source_sentence, sentences}. Raises InputFault."""
    if not isinstance(value, dict) or value.keys() != {"source_sentence", "sentences"}:
        raise InputFault(
            "validation_error", "must be an object of source_sentence and sentences alone"
        )
    try:
        source = _source(value["source_sentence"])
    except InputFault as fault:
        raise InputFault(fault.code, fault.sentence, field="source_sentence") from fault
    try:
        return Sentences(source, parse_texts(value["sentences"], info))
    except InputFault as fault:
        details = fault.details | {"field": "sentences"}
        raise InputFault(fault.code, fault.sentence, **details) from fault


def _parse_rows_or_sentences(value: Any, info: ValidationInfo) -> Rows | Sentences:
    return _parse_sentences(value, info) if isinstance(value, dict) else parse_inputs(value, info)


_SENTENCES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "source_sentence": TEXT,
        "sentences": {"type": "array", "items": TEXT, "minItems": 1},
    },
    "required": ["source_sentence", "sentences"],
    "additionalProperties": False,
}


class SimilarityRequest(TeiRequest):
    """The sentences stand in `inputs`, or in the body itself."""

    inputs: (
        Annotated[Sentences, PlainValidator(_parse_sentences), WithJsonSchema(_SENTENCES)] | None
    ) = None
    source_sentence: Annotated[str, PlainValidator(_source), WithJsonSchema(TEXT)] | None = None
    sentences: (
        Annotated[
            Rows, PlainValidator(parse_texts), WithJsonSchema(_SENTENCES["properties"]["sentences"])
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _in_one_place(self) -> "SimilarityRequest":
        _check_places(self.inputs is not None, self.source_sentence, self.sentences)
        return self

    @property
    def compared(self) -> Sentences:
        if self.inputs is not None:
            return self.inputs
        assert self.source_sentence is not None
        assert self.sentences is not None
        return Sentences(self.source_sentence, self.sentences)


class RootRequest(PooledRequest):
    """POST /: texts to embed, or a sentence and those that it is compared with."""

    inputs: (
        Annotated[
            Rows | Sentences,
            PlainValidator(_parse_rows_or_sentences),
            rows_schema("Rows, or source_sentence and sentences.", TEXT, IDS, _SENTENCES),
        ]
        | None
    ) = None
    source_sentence: Annotated[str, PlainValidator(_source), WithJsonSchema(TEXT)] | None = None
    sentences: (
        Annotated[
            Rows, PlainValidator(parse_texts), WithJsonSchema(_SENTENCES["properties"]["sentences"])
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _in_one_place(self) -> "RootRequest":
        _check_places(self.inputs is not None, self.source_sentence, self.sentences)
        return self

    @property
    def compared(self) -> Sentences | None:
        """What is to be compared; None where `inputs` are to be embedded."""
        if isinstance(self.inputs, Sentences):
            return self.inputs
        if self.source_sentence is not None and self.sentences is not None:
            return Sentences(self.source_sentence, self.sentences)
        return None


def _check_places(in_inputs: bool, source: str | None, sentences: Rows | None) -> None:
    """Raises InputFault unless the texts stand in `inputs`, or in both of the other fields."""
    beside = [source is not None, sentences is not None]
    if in_inputs == any(beside) or any(beside) != all(beside):
        raise InputFault(
            "validation_error", "give inputs, or source_sentence and sentences", field="inputs"
        )


def _parse_predicted(value: Any, info: ValidationInfo) -> Rows:
    """A text, a list of that text alone, or a list of such lists. Raises InputFault.

    text-embeddings-inference reads a list of two texts as a pair; this classifier takes one.
    """
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        for row, item in enumerate(value):
            _demand_one(item, row)
        return parse_texts([item[0] for item in value], info)
    if isinstance(value, list):
        _demand_one(value, None)
        value = value[0]
    if not isinstance(value, str):
        raise InputFault("validation_error", "must be a text, or a list of lists of one text each")
    return parse_inputs(value, info)


def _demand_one(item: list[Any], row: int | None) -> None:
    if not item:
        raise InputFault("empty_input", "the list is empty", row=row)
    if len(item) > 1:
        sentence = (
            "a list of texts is a pair here, and the classifier takes one text a row: send a "
            "batch as [[text], [text]]"
        )
        raise InputFault("validation_error", sentence, row=row)


class PredictRequest(TeiRequest):
    elsewhere: ClassVar = TeiRequest.elsewhere | {
        "raw_scores": Elsewhere((False,), "scores are the classifier's softmax"),
        "function_to_apply": Elsewhere(("softmax",), "scores are the classifier's softmax"),
    }

    inputs: Annotated[
        Rows,
        PlainValidator(_parse_predicted),
        WithJsonSchema(
            {
                "anyOf": [
                    TEXT,
                    {
                        "type": "array",
                        "items": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 1},
                        "minItems": 1,
                    },
                ]
            }
        ),
    ]
    top_k: Annotated[int, Field(ge=1)] | None = None
