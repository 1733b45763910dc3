"""Answers of /encode, /critic and /classify, and the parts that other answers share with them."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from server.answer_shapes.presence import sometimes


class AdapterVersion(BaseModel):
    """The adapter version that computed a row."""

    name: str
    version: int
    digest: str = Field(description="sha256: and the digest of the adapter's file.")


class Usage(BaseModel):
    """Tokens of the request; each input counts once for every adapter."""

    prompt_tokens: int
    total_tokens: int


class Timings(BaseModel):
    """Where the request's time went, in milliseconds."""

    tokenize: float
    queue: float = Field(description="The longest wait of a row.")
    forward: float = Field(description="The longest forward pass of a row.")
    total: float


class RowError(BaseModel):
    """Why a row has no result, while the rest of the request was served."""

    code: str = Field(description="As in an error answer.")
    message: str
    details: dict[str, Any] = sometimes("As in an error answer.")


class FailedRow(BaseModel):
    """A row that failed: it carries `error` in place of data."""

    index: int
    adapter: AdapterVersion | None = Field(description="null: the backbone alone.")
    error: RowError


class Token(BaseModel):
    """A token of an input."""

    id: int
    text: str
    start: int | None = Field(
        description="Where it begins in the text, in characters; null for ids."
    )
    end: int | None = Field(description="Where it ends; null where the input was token ids.")


class TokenState(Token):
    """A token with its hidden state."""

    hidden: list[float]


class CriticToken(Token):
    """A token with what the critic head says about it."""

    logit: float | None = Field(description="The critic head's value: higher is more likely wrong.")
    wrongness: float | None = Field(
        description="The probability that the token is wrong, calibrated."
    )


class CriticValue(BaseModel):
    """What the critic head says about the token at the same place of `tokens` of /tokenize."""

    logit: float | None = Field(description="The critic head's value: higher is more likely wrong.")
    wrongness: float | None = Field(
        description="The probability that the token is wrong, calibrated."
    )


class Critic(BaseModel):
    """The critic's judgement of a row."""

    score: float | None = Field(description="The mean wrongness of the row's tokens.")
    sequence_score: float | None = Field(
        description="The sequence head's value; null without that head, or without a first [CLS]."
    )
    tokens: list[CriticValue]


class LikelyToken(BaseModel):
    """One of the likeliest tokens at a masked position."""

    id: int
    text: str
    logprob: float


class MaskedPosition(BaseModel):
    """The likeliest tokens at one [MASK] of the input, best first."""

    position: int
    top: list[LikelyToken]


class Label(BaseModel):
    """A label of the adapter's classifier, with its probability."""

    label: str
    score: float


class EncodedRow(BaseModel):
    """One input under one adapter: what `outputs` asked for."""

    index: int
    adapter: AdapterVersion | None = Field(description="null: the backbone alone.")
    truncated: bool = Field(description="Whether the input was cut to block_size.")
    embedding: list[float] | str = sometimes(
        "Numbers, or with encoding_format base64 their bytes as little-endian floats."
    )
    tokens: list[TokenState] = sometimes("With the output tokens.")
    critic: Critic = sometimes("With the output critic.")
    logits: list[MaskedPosition] = sometimes("With the output logits: an entry for every [MASK].")
    labels: list[Label] = sometimes("With the output labels: all labels, best first.")


class EncodeAnswer(BaseModel):
    """A row for every input under every adapter, inputs outermost."""

    object: Literal["list"]
    model: str = Field(description="The backbone's id.")
    data: list[EncodedRow | FailedRow]
    usage: Usage
    timings_ms: Timings


class CriticRow(BaseModel):
    """One input under one adapter, judged token by token."""

    index: int
    adapter: AdapterVersion | None = Field(description="null: the backbone alone.")
    truncated: bool = Field(description="Whether the input was cut to block_size.")
    score: float | None = Field(description="The mean wrongness of the row's tokens.")
    sequence_score: float | None = Field(
        description="The sequence head's value; null without that head, or without a first [CLS]."
    )
    tokens: list[CriticToken]


class CriticAnswer(BaseModel):
    """A row for every input under every adapter, inputs outermost."""

    object: Literal["list"]
    model: str = Field(description="The backbone's id.")
    data: list[CriticRow | FailedRow]
    usage: Usage
    timings_ms: Timings


class ClassifiedRow(BaseModel):
    """One input under one adapter, classified."""

    index: int
    adapter: AdapterVersion | None
    labels: list[Label] = Field(description="Best first, top_k of them.")


class ClassifyAnswer(BaseModel):
    """A row for every input under every adapter, inputs outermost."""

    object: Literal["list"]
    model: str = Field(description="The backbone's id.")
    data: list[ClassifiedRow | FailedRow]
    usage: Usage
    timings_ms: Timings
