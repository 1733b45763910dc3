"""Inputs to rows of ids: tokenised off the event loop where it would be felt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from adapters.errors import TrunklineError
from model.tokenizer import Tokenizer, UntokenizableText
from server.engine import errors
from server.engine.job import Ids
from server.fair_work import FairWork

# Beyond so many characters a request is tokenised in a worker thread (about 1 ms of work), and one
# with a longer text than that in the one thread for such.
INLINE_CHARACTERS = 4096
LONG_CHARACTERS = 256 << 10
THREADS, MOST_WAITING = 2, 256
MOST_LONG_WAITING = 8  # of one key: each holds its text


class TokenizerThreads:
    """The threads of one app that tokenise large inputs, shared by API key."""

    def __init__(self) -> None:
        self.texts = FairWork(THREADS, "tokenizer", MOST_WAITING)
        self.long_texts = FairWork(1, "long text", MOST_LONG_WAITING)

    async def close(self) -> None:
        """At the end of the application."""
        await self.texts.close()
        await self.long_texts.close()


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

    def most(self, row: int) -> int:
        return self.first_row if row == 0 and self.first_row is not None else self.tokens

    def parts(self, ids: Sequence[int] | Ids, row: int) -> tuple[int, int]:
        """(head, tail): ids[:head] and ids[tail:] stay."""
        most = self.most(row)
        if len(ids) <= most:
            return len(ids), len(ids)
        if not self.left:
            return most, len(ids)
        head = 1 if most > 1 and ids[0] == self.cls else 0
        return head, len(ids) - most + head


@dataclass(frozen=True)
class Most:
    """The tokens that one text may have before it is cut, what sets them, and the error beyond."""

    tokens: int
    setting: str
    error: type[TrunklineError]
    in_all: int  # max_request_tokens: of all rows, behind the cut


async def encode_inputs(
    inputs: Sequence[str | Ids],
    tokenizer: Tokenizer,
    cut: Cut | None,
    most: Most,
    threads: TokenizerThreads,
    key: str,
) -> list[Encoded]:
    """One Encoded an input; None cuts nothing.

    Raises, before anything is tokenised, `most`'s error for a text whose length alone shows that it
    has more tokens, and TooManyTokens where all of them have; both too as soon as so many tokens
    are found; UntokenizableText, or EmptyInput for a text that has no tokens; Overloaded where too
    much of the API key `key` waits for the threads.
    """
    texts = [item for item in inputs if isinstance(item, str)]
    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        return _encode_all(inputs, tokenizer, cut, most)
    long = max(map(len, texts)) > LONG_CHARACTERS
    work = partial(_encode_all, inputs, tokenizer, cut, most)
    return await (threads.long_texts if long else threads.texts).run(key, work)


def _refuse_too_long(
    inputs: Sequence[str | Ids], tokenizer: Tokenizer, cut: Cut | None, most: Most
) -> None:
    in_all = 0
    for row, item in enumerate(inputs):
        least = tokenizer.least_tokens(item, most.tokens) if isinstance(item, str) else 0
        if least > most.tokens:
            raise _too_long(least, row, most)
        in_all += min(least, cut.most(row)) if cut else least
    check_tokens(in_all, most.in_all, "at least ")


def check_tokens(tokens: int, limit: int, how: str = "") -> None:
    """Raises TooManyTokens for more than a request may have."""
    if tokens > limit:
        raise errors.TooManyTokens(
            f"the request has {how}{tokens} tokens; max_request_tokens is {limit}",
            tokens=tokens,
            limit=limit,
            setting="max_request_tokens",
        )


def _encode_all(
    inputs: Sequence[str | Ids], tokenizer: Tokenizer, cut: Cut | None, most: Most
) -> list[Encoded]:
    characters = sum(len(item) for item in inputs if isinstance(item, str))
    if characters > min(most.tokens, most.in_all):  # else there are not so many tokens
        _refuse_too_long(inputs, tokenizer, cut, most)
    rows, tokens = [], 0
    for row, item in enumerate(inputs):
        encoded = _encode(item, row, tokenizer, cut, most)
        tokens += len(encoded.ids)
        check_tokens(tokens, most.in_all, "at least ")
        rows.append(encoded)
    return rows


def _encode(
    item: str | Ids, row: int, tokenizer: Tokenizer, cut: Cut | None, most: Most
) -> Encoded:
    if not isinstance(item, str):
        return _cut_ids(item, row, cut)
    try:
        text = _text_to_encode(item, row, tokenizer, cut, most)
        tokens = tokenizer.encode(text, (lambda ids: cut.parts(ids, row)) if cut else None)
    except UntokenizableText as error:
        raise errors.UntokenizableText(str(error), row=row, offset=error.offset) from error
    if not tokens.ids:
        raise errors.EmptyInput("the text has no tokens", row=row)
    ids = np.array(tokens.ids, dtype=np.int64)
    return Encoded(ids, item, tokens.offsets, tokens.cut or len(text) < len(item))


def _text_to_encode(text: str, row: int, tokenizer: Tokenizer, cut: Cut | None, most: Most) -> str:
    """The part of the text that its row is cut from. Raises `most`'s error for too many tokens."""
    if cut is not None and not cut.left and cut.most(row) <= most.tokens:
        return tokenizer.head(text, cut.most(row))
    tokens = tokenizer.count_beyond(text, most.tokens)
    if tokens is not None:
        raise _too_long(tokens, row, most)
    return text


def _too_long(tokens: int, row: int, most: Most) -> TrunklineError:
    return most.error(
        f"the row has at least {tokens} tokens; {most.setting} is {most.tokens}",
        row=row,
        tokens=tokens,
        limit=most.tokens,
    )


def _cut_ids(ids: Ids, row: int, cut: Cut | None) -> Encoded:
    head, tail = cut.parts(ids, row) if cut else (len(ids), len(ids))
    if head == len(ids):
        return Encoded(ids, None, None, False)
    return Encoded(np.concatenate((ids[:head], ids[tail:])), None, None, True)


def token_entries(encoded: Encoded, tokenizer: Tokenizer) -> Iterator[dict[str, object]]:
    """id, text, start and end of every token; start and end are characters, null for id inputs."""
    if encoded.text is None or encoded.offsets is None:
        for token in encoded.ids.tolist():
            yield {"id": token, "text": tokenizer.text_of(token), "start": None, "end": None}
        return
    for token, (start, end) in zip(encoded.ids.tolist(), encoded.offsets, strict=True):
        yield {"id": token, "text": encoded.text[start:end], "start": start, "end": end}
