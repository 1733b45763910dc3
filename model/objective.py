"""What is trained: an objective reads examples out of rows, has a loss and measures itself.

An objective is a module that holds the GPT and, where the task has one, a head of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.batches import Batch, Batches, Example
from model.corpus import Row
from model.gpt import GPT
from model.tokenizer import Tokenizer

Loss = tuple[Tensor, dict[str, float]]  # the loss, and its named parts


class Objective(nn.Module, ABC):
    fields: ClassVar[tuple[str, ...]]  # a row's fields, under their usual names
    heads: tuple[str, ...] = ()  # of the GPT (model.gpt.HEADS), those that its loss trains

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt
        if gpt.config.pad_token_id is None:
            raise ValueError(
                "the trunk has no pad_token_id, and training pads the rows of a batch with it: a "
                "vocabulary with [PAD] has to be in the trunk's own training"
            )
        self.pad_token_id = gpt.config.pad_token_id

    @abstractmethod
    def example(self, row: Row, names: Sequence[str], tokenizer: Tokenizer) -> Example:
        """The row's example; `names` are its fields, in the order of `fields`. DataError."""

    @abstractmethod
    def loss(self, batch: Batch, share: float) -> Loss:
        """The batch's mean loss; `share`, 0..1, is how much of the training is done."""

    @abstractmethod
    def measure(self, batches: Iterator[Batch]) -> dict[str, float]:
        """The task's measures over all batches."""

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], batch_tokens: int) -> dict[str, float]:
        """The task's measures on held-out examples, in float32."""
        self.eval()
        torch.manual_seed(0)
        return self.measure(Batches(examples, batch_tokens, 0).in_order(self.gpt.config))

    def hidden(self, ids: Tensor) -> Tensor:
        """(R, T) ids -> (R, T, C), after ln_f."""
        return self.gpt.hidden_states(ids)[-1]

    def pooled(self, ids: Tensor) -> Tensor:
        """(R, T) ids -> (R, C) float32, by the config's pooling."""
        return self.pool(self.hidden(ids), ids)

    def pool(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """hidden (R, T, C) of the ids (R, T) -> (R, C) float32, by the config's pooling."""
        hidden, keep = hidden.float(), ids != self.pad_token_id
        if self.gpt.config.pooling == "cls":
            return hidden[:, 0]
        if self.gpt.config.pooling == "last":
            return hidden[torch.arange(len(ids)), keep.sum(1) - 1]
        return (hidden * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True)
