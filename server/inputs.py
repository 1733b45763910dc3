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


@dataclass(frozen=True)
class Cut:
    """Rows are cut to `tokens`: their end is cut off, or with `left` their beginning.

    A [CLS] (the id `cls`) at the front of a row stays there, because the sequence head and pooling
    by cls read the row's first token.
    """

    tokens: int
    left: bool = False
    cls: int | None = None
    first_row: int | None = None  # another length for row 0: a query before its documents

    def parts(self, ids: Sequence[int] | Ids, row: int) -> tuple[int, int]:
        """(head, tail): ids[:head] and ids[tail:] stay."""
        most = self.first_row if row == 0 and self.first_row is not None else self.tokens
        if len(ids) <= most:
            return len(ids), len(ids)
        if not self.left:
            return most, len(ids)
        head = 1 if most > 1 and ids[0] == self.cls else 0
        return head, len(ids) - most + head


async def encode_inputs(
    inputs: Sequence[str | Ids],
    tokenizer: Tokenizer,
    cut: Cut | None,
    most: int | None = None,
) -> list[Encoded]:
    """One Encoded an input; None cuts nothing.

    Raises SequenceTooLong, before it is tokenised, for a text whose length alone shows that it has
    over `most` tokens; UntokenizableText, or EmptyInput for a text that has no tokens.
    """
    if most is not None:
        _refuse_too_long(inputs, tokenizer, most)
    characters = sum(len(item) for item in inputs if isinstance(item, str))
    if characters <= INLINE_CHARACTERS:
        return _encode_all(inputs, tokenizer, cut)
    return await asyncio.to_thread(_encode_all, inputs, tokenizer, cut)


def _refuse_too_long(inputs: Sequence[str | Ids], tokenizer: Tokenizer, most: int) -> None:
    for row, item in enumerate(inputs):
        least = tokenizer.least_tokens(item) if isinstance(item, str) else 0
        if least > most:
            raise errors.SequenceTooLong(
                f"the row has at least {least} tokens; block_size is {most}",
                row=row,
                tokens=least,
                limit=most,
            )


def _encode_all(
    inputs: Sequence[str | Ids], tokenizer: Tokenizer, cut: Cut | None
) -> list[Encoded]:
    return [_encode(item, row, tokenizer, cut) for row, item in enumerate(inputs)]


def _encode(item: str | Ids, row: int, tokenizer: Tokenizer, cut: Cut | None) -> Encoded:
    if not isinstance(item, str):
        return _cut_ids(item, row, cut)
    try:
        tokens = tokenizer.encode(item)
    except UntokenizableText as error:
        raise errors.UntokenizableText(str(error), row=row, offset=error.offset) from error
    if not tokens.ids:
        raise errors.EmptyInput("the text has no tokens", row=row)
    ids, offsets = tokens.ids, tokens.offsets
    head, tail = cut.parts(ids, row) if cut else (len(ids), len(ids))
    if head == len(ids):
        return Encoded(np.array(ids, dtype=np.int64), item, offsets, False)
    kept = np.array(ids[:head] + ids[tail:], dtype=np.int64)
    return Encoded(kept, item, offsets[:head] + offsets[tail:], True)


def _cut_ids(ids: Ids, row: int, cut: Cut | None) -> Encoded:
    head, tail = cut.parts(ids, row) if cut else (len(ids), len(ids))
    if head == len(ids):
        return Encoded(ids, None, None, False)
    return Encoded(np.concatenate((ids[:head], ids[tail:])), None, None, True)


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
