"""Inputs to rows of ids: tokenised off the event loop where it would be felt."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.tokenizer import Tokenizer, UntokenizableText
from server.engine import errors
from server.engine.job import Ids

# Beyond so many characters a request is tokenised in a worker thread (about 1 ms of work).
INLINE_CHARACTERS = 4096


@dataclass(frozen=True)
class Encoded:
    """One input as the trunk sees it; text and offsets are None where ids were sent."""

    ids: Ids  # (T,)
    text: str | None
    offsets: Sequence[tuple[int, int]] | None
    truncated: bool


async def encode_inputs(
    inputs: Sequence[str | Ids],
    tokenizer: Tokenizer,
    limit: int | None,
    most: int | None = None,
) -> list[Encoded]:
    """One Encoded an input, cut to `limit` tokens; None cuts nothing.

    Raises SequenceTooLong, before it is tokenised, for a text whose length alone shows that it has
    over `most` tokens; UntokenizableText, or EmptyInput for a text that has no tokens.
    """
    if most is not None:
        _refuse_too_long(inputs, tokenizer, most)
    characters = sum(len(item) for item in inputs if isinstance(item, str))
    if characters <= INLINE_CHARACTERS:
        return _encode_all(inputs, tokenizer, limit)
    return await asyncio.to_thread(_encode_all, inputs, tokenizer, limit)


def _refuse_too_long(inputs: Sequence[str | Ids], tokenizer: Tokenizer, most: int) -> None:
    for row, item in enumerate(inputs):
        least = tokenizer.least_tokens(item) if isinstance(item, str) else 0
        if least > most:
            raise errors.SequenceTooLong(
                f"a row has at least {least} tokens; block_size is {most}",
                row=row,
                tokens=least,
                limit=most,
            )


def _encode_all(
    inputs: Sequence[str | Ids], tokenizer: Tokenizer, limit: int | None
) -> list[Encoded]:
    return [_encode(item, row, tokenizer, limit) for row, item in enumerate(inputs)]


def _encode(item: str | Ids, row: int, tokenizer: Tokenizer, limit: int | None) -> Encoded:
    if not isinstance(item, str):
        return Encoded(item[:limit], None, None, limit is not None and len(item) > limit)
    try:
        tokens = tokenizer.encode(item)
    except UntokenizableText as error:
        raise errors.UntokenizableText(str(error), row=row, offset=error.offset) from error
    if not tokens.ids:
        raise errors.EmptyInput("a text has no tokens", row=row)
    ids = np.array(tokens.ids[:limit], dtype=np.int64)
    return Encoded(ids, item, tokens.offsets[:limit], len(ids) < len(tokens.ids))


def token_entries(encoded: Encoded, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """id, text, start and end of every token; start and end are characters, null for id inputs."""
    if encoded.text is None or encoded.offsets is None:
        return [
            {"id": token, "text": tokenizer.text_of(token), "start": None, "end": None}
            for token in encoded.ids.tolist()
        ]
    return [
        {"id": token, "text": encoded.text[start:end], "start": start, "end": end}
        for token, (start, end) in zip(encoded.ids.tolist(), encoded.offsets, strict=True)
    ]
