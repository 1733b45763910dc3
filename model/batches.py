"""Batches of training rows: rows of like lengths together, so that little of a batch is padding."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.config import GPTConfig

POOL_BATCHES = 64  # rows are sorted by length within about this many batches


def padded_length(length: int) -> int:
    """The length that rows of `length` tokens are padded to: one of few.

    The CPU's matrix kernels are compiled, and kept, for each shape they meet.
    """
    step = 4 if length <= 64 else 16 if length <= 256 else 64
    return -(-length // step) * step


@dataclass(frozen=True)
class Example:
    """What one loss term is computed from: a text's ids, or for pairs those of two texts."""

    rows: tuple[Sequence[int], ...]
    # A class, a score, a 0/1 label for each token, or a teacher's vector for the row.
    target: int | float | Sequence[int] | Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens it takes in a padded batch of examples no longer than itself."""
        return len(self.rows) * padded_length(max(len(row) for row in self.rows))


@dataclass(frozen=True)
class Batch:
    """ids (R, T), padded on the right. Of pairs, the R / 2 first texts come before the second.

    T is a padded_length; rows of many lengths in an epoch make few shapes.
    """

    ids: Tensor
    examples: Sequence[Example]

    @classmethod
    def of(cls, examples: Sequence[Example], config: GPTConfig) -> "Batch":
        assert config.pad_token_id is not None, "rows of a batch are padded"
        columns = zip(*(example.rows for example in examples), strict=True)
        rows = [row for column in columns for row in column]
        length = min(padded_length(max(map(len, rows))), config.block_size)
        ids = torch.full((len(rows), length), config.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(row)
        return cls(ids, examples)

    @property
    def tokens(self) -> int:
        return sum(len(row) for example in self.examples for row in example.rows)


class Batches:
    """The batches of every epoch: a function of the seed and the epoch's number, nothing else."""

    def __init__(self, examples: Sequence[Example], batch_tokens: int, seed: int) -> None:
        self.examples, self.batch_tokens, self.seed = examples, batch_tokens, seed
        self._sizes = np.array([example.tokens for example in examples])
        self._pool = max(1, round(POOL_BATCHES * batch_tokens / self._sizes.mean()))

    def epoch(self, number: int) -> list[list[int]]:
        """Indices of examples, a list for each batch, in random order."""
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.examples))
        batches: list[list[int]] = []
        for start in range(0, len(order), self._pool):
            pool = order[start : start + self._pool]
            batches += self._cut(pool[np.argsort(self._sizes[pool], kind="stable")])
        return [batches[i] for i in random.permutation(len(batches))]

    def _cut(self, ordered: np.ndarray) -> Iterator[list[int]]:
        """Runs of the ordered indices, each of batch_tokens with its padding, or one example."""
        batch: list[int] = []
        for index in ordered.tolist():
            if batch and (len(batch) + 1) * self._sizes[index] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def steps(self, epochs: float) -> int:
        """How many batches so many epochs have, by the first one's count."""
        return max(1, math.ceil(epochs * len(self.epoch(0))))

    def from_step(self, step: int, steps: int, config: GPTConfig) -> Iterator[Batch]:
        """The batches of steps step + 1 to `steps`."""
        epoch = count = 0
        while count < steps:
            for indices in self.epoch(epoch):
                count += 1
                if step < count <= steps:
                    yield Batch.of([self.examples[i] for i in indices], config)
            epoch += 1

    def in_order(self, config: GPTConfig) -> Iterator[Batch]:
        """Every example once, from the shortest to the longest: for evaluation."""
        for indices in self._cut(np.argsort(self._sizes, kind="stable")):
            yield Batch.of([self.examples[i] for i in indices], config)
