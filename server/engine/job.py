"""A Job: one row under one adapter on its way through the engine, and what comes back."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.errors import TrunklineError
from adapters.versions import Version
from model.encoder import FINAL
from model.lora import AdapterWeights
from server.engine.errors import DeadlineExceeded

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Ask:
    """What a request wants of each of its rows."""

    outputs: frozenset[str]  # of embedding, tokens, critic, logits, labels
    pooling: str = "mean"
    layer: int = FINAL  # of embedding and tokens; FINAL or 1..n_layer
    top_k: int = 5  # of logits


@dataclass
class Result:
    """One row's outputs, in float32 on the CPU; None where not asked for."""

    adapter: Version | None
    embedding: Floats | None = None  # (C,)
    hidden: Floats | None = None  # (T, C)
    critic_logits: Floats | None = None  # (T,)
    wrongness: Floats | None = None  # (T,)
    sequence_score: float | None = None
    masks: list[int] | None = None  # positions of [MASK], M of them
    top_ids: Ids | None = None  # (M, k)
    top_logprobs: Floats | None = None  # (M, k)
    labels: tuple[str, ...] | None = None  # K names
    label_scores: Floats | None = None  # (K,)
    error: TrunklineError | None = None  # then the rest is None
    queue_ms: float = 0.0
    forward_ms: float = 0.0


class Reply:
    """Collects the results of one request's rows; its future is done when the last is there."""

    def __init__(self, rows: int) -> None:
        self._results: list[Result | None] = [None] * rows
        self._missing = rows
        self.future: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        self.abandoned = False  # nobody waits any more: rows not yet begun are dropped

    def expire(self) -> None:
        self.refuse(DeadlineExceeded("the deadline was over before the answer was there"))

    def refuse(self, error: TrunklineError) -> None:
        """Whoever waits gets the error, unless the results are there."""
        if not self.future.done():
            self.future.set_exception(error)

    def put(self, row: int, result: Result) -> None:
        """To be called on the event loop, once for each row."""
        assert self._results[row] is None, f"row {row} was answered twice"
        self._results[row] = result
        self._missing -= 1
        if self._missing == 0 and not self.future.done():
            self.future.set_result([r for r in self._results if r is not None])


@dataclass(eq=False)
class Job:
    """One row. The engine owns it from admission to `release`, which gives back what it holds."""

    ids: Ids  # (T,)
    ask: Ask
    adapter: Version | None
    deadline: float  # time.monotonic()
    admitted: float  # time.monotonic()
    reply: Reply
    row: int
    release: Callable[[], None]  # gives back lease and permits; called exactly once
    key: str = ""  # id of the API key it came with
    weights: AdapterWeights | None = None  # the device thread's, while it holds the slot

    @property
    def tokens(self) -> int:
        return len(self.ids)
