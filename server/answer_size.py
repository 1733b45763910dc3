"""How large an answer will be, told before its forward, and built where it holds nobody up."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from starlette.responses import Response

from model.config import GPTConfig
from server.engine.errors import TooManyTokens
from server.engine.job import Ask, Ids

# What one likely token counts: its id, text and log-probability are objects with names.
LIKELY_TOKEN, CRITIC_TOKEN = 16, 4
INLINE_VALUES = 20_000  # about a millisecond's work


def values_of(rows: Sequence[Ids], ask: Ask, config: GPTConfig) -> int:
    """The numbers that an answer for these rows has, about."""
    tokens = sum(map(len, rows))
    values = len(rows) * config.n_embd if "embedding" in ask.outputs else 0
    if "tokens" in ask.outputs:
        values += tokens * config.n_embd
    if "critic" in ask.outputs:
        values += tokens * CRITIC_TOKEN
    if "logits" in ask.outputs:
        masks = sum(int(np.count_nonzero(ids == config.mask_token_id)) for ids in rows)
        values += masks * min(ask.top_k, config.vocab_size) * LIKELY_TOKEN
    return values


def check_values(values: int, limit: int) -> None:
    """Raises TooManyTokens."""
    if values > limit:
        raise TooManyTokens(
            f"the answer would have about {values} values; max_answer_values is {limit}: send "
            "fewer rows, ask for fewer outputs, or for a smaller top_k",
            values=values,
            limit=limit,
            setting="max_answer_values",
        )


async def built(values: int, build: Callable[[], Response]) -> Response:
    """The answer; a large one is built in a worker thread."""
    return build() if values <= INLINE_VALUES else await asyncio.to_thread(build)
