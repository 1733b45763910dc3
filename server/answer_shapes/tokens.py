"""Answers of /tokenize and /detokenize."""

from typing import Literal

from pydantic import BaseModel, Field

from server.answer_shapes.inference import Token


class TokenizedRow(BaseModel):
    """The tokens of one text."""

    index: int
    tokens: list[Token]


class TokenizeAnswer(BaseModel):
    """A row for every text."""

    object: Literal["list"]
    model: str = Field(description="The backbone's id.")
    data: list[TokenizedRow]


class DetokenizeAnswer(BaseModel):
    """The text of every list of ids."""

    text: str | None = Field(description="The text, where there is one list; else null.")
    texts: list[str]
