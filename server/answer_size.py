"""The size of an answer: counted before its forward pass, and held to the limits of the settings.

The bytes are those of the answer and of the results that it is made of. They are an upper bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import orjson

from adapters.validate import Manifest
from model.config import GPTConfig
from model.tokenizer import Tokenizer
from server.engine.errors import TooManyTokens
from server.engine.job import Ask
from server.inputs import Encoded
from server.settings import Settings

# What one of these counts in values: building it takes as long as building so many numbers.
LIKELY_TOKEN, CRITIC_TOKEN, TOKEN, LABEL = 16, 4, 4, 8
SCORES_OF_A_VALUE = 4  # labels are scored and sorted, whether they are sent or not

# The most bytes of one of these in JSON, without its text or name. A token entry has twelve bytes
# for characters that it shares with its neighbours.
ROW, TOKEN_ENTRY, CRITIC_ENTRY, LIKELY_ENTRY, MASK_ENTRY, LABEL_ENTRY = 768, 84, 96, 72, 40, 64
# Bytes of one number: 4 of its float32 result, and those that are sent.
UNSENT, BINARY, BASE64, JSON = 4, 8, 10, 20


# A larger answer is built off the event loop: about a millisecond's work.
INLINE_VALUES, INLINE_BYTES = 20_000, 512 << 10


@dataclass(frozen=True)
class AnswerSize:
    """At most so many values and bytes."""

    values: int = 0
    bytes: int = 0

    def __add__(self, other: "AnswerSize") -> "AnswerSize":
        return AnswerSize(self.values + other.values, self.bytes + other.bytes)

    @property
    def is_large(self) -> bool:
        """Whether building it would hold up the event loop."""
        return self.values > INLINE_VALUES or self.bytes > INLINE_BYTES

    def times(self, count: int) -> "AnswerSize":
        return AnswerSize(self.values * count, self.bytes * count)


@dataclass(frozen=True)
class Form:
    """What a route sends of its results."""

    vector: int = JSON  # bytes of a number of a pooled row
    state: int = JSON  # bytes of a number of a token's state
    labels: int | None = None  # the best so many; None is all
    more: int = 0  # bytes besides: documents that are sent back
    in_header: bool = False  # every row's adapter is named in one header line


def size_of(
    rows: Sequence[Encoded],
    adapters: Sequence[Manifest | None],
    ask: Ask,
    form: Form,
    config: GPTConfig,
    tokenizer: Tokenizer,
) -> AnswerSize:
    """The size of the answer for each of the rows under each of the adapters; None is the base."""
    size = AnswerSize(0, len(rows) * ROW) + _of_numbers(rows, ask, form, config)
    if not ask.outputs.isdisjoint(("tokens", "critic")):
        size += AnswerSize(0, sum(size_of_tokens(row, tokenizer).bytes for row in rows))
    if "logits" in ask.outputs:
        size += _of_likely_tokens(rows, ask.top_k, config, tokenizer)
    size = size.times(len(adapters))
    if "labels" in ask.outputs:
        for adapter in adapters:
            size += _of_labels(adapter, form.labels).times(len(rows))
    return size + AnswerSize(0, form.more)


def _of_numbers(rows: Sequence[Encoded], ask: Ask, form: Form, config: GPTConfig) -> AnswerSize:
    tokens, size = sum([len(row.ids) for row in rows]), AnswerSize()
    if "embedding" in ask.outputs:
        size += AnswerSize(1, form.vector).times(len(rows) * config.n_embd)
    if "tokens" in ask.outputs:
        size += AnswerSize(1, form.state).times(tokens * config.n_embd)
    if "critic" in ask.outputs:
        size += AnswerSize(CRITIC_TOKEN, CRITIC_ENTRY).times(tokens)
    return size


def _of_likely_tokens(
    rows: Sequence[Encoded], top_k: int, config: GPTConfig, tokenizer: Tokenizer
) -> AnswerSize:
    masks = sum(int(np.count_nonzero(row.ids == config.mask_token_id)) for row in rows)
    likely = min(top_k, config.vocab_size)
    text_bytes = tokenizer.longest_texts(likely)
    size = AnswerSize(LIKELY_TOKEN, LIKELY_ENTRY).times(likely) + AnswerSize(0, text_bytes)
    return (size + AnswerSize(0, MASK_ENTRY)).times(masks)


def size_of_tokens(row: Encoded, tokenizer: Tokenizer) -> AnswerSize:
    """The size of the row's token entries."""
    if row.text is None:
        text_bytes = tokenizer.most_text_bytes(row.ids)
    else:
        text_bytes = len(orjson.dumps(row.text))
    return AnswerSize(TOKEN, TOKEN_ENTRY).times(len(row.ids)) + AnswerSize(0, text_bytes)


def _of_labels(adapter: Manifest | None, top_k: int | None) -> AnswerSize:
    if adapter is None or not adapter.labels:
        return AnswerSize()
    known = len(adapter.labels)
    shown = known if top_k is None else min(top_k, known)
    size = AnswerSize(LABEL, LABEL_ENTRY).times(shown)
    scores = AnswerSize(known // SCORES_OF_A_VALUE, known * UNSENT)
    return size + scores + AnswerSize(0, adapter.longest_labels(shown))


def check_size(size: AnswerSize, settings: Settings) -> None:
    """Raises TooManyTokens for an answer beyond max_answer_values or max_answer_bytes."""
    _check("values", size.values, settings.max_answer_values)
    _check("bytes", size.bytes, settings.max_answer_bytes)


def _check(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise TooManyTokens(
            f"the answer could have {size} {what}; max_answer_{what} is {limit}: send fewer rows, "
            "ask for fewer outputs, or for a smaller top_k",
            limit=limit,
            setting=f"max_answer_{what}",
            **{what: size},
        )
