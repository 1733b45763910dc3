"""What is read off the hidden states: pooled rows, critic, sequence score, mask logits, labels.

All in float32, whatever the trunk's dtype.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.lora import Classifier, SequenceHead
from model.packed import PackedBatch

CALIBRATION_BUCKETS = 100
SEQUENCE_HEAD = ("sequence_head.base_predictor.weight", "sequence_head.A", "sequence_head.B")


@dataclass(frozen=True)
class TrunkHeads:
    """The critic and the sequence head of a backbone, where it has them, in float32."""

    critic: Tensor | None  # (C,)
    sequence: SequenceHead | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "TrunkHeads":
        """tensors are those of a backbone folder, by name."""
        placed = {
            name: tensors[name].to(device, torch.float32)
            for name in ("critic_head.weight", *SEQUENCE_HEAD)
            if name in tensors
        }
        critic = placed.get("critic_head.weight")
        sequence = None
        if SEQUENCE_HEAD[0] in placed:
            weight, a, b = (placed[name] for name in SEQUENCE_HEAD)
            sequence = SequenceHead(weight[0], a, b)
        return cls(None if critic is None else critic[0], sequence)


def pool(hidden: Tensor, batch: PackedBatch, rows: Sequence[int], pooling: str) -> Tensor:
    """One vector a row: hidden (N, C) -> (len(rows), C) float32.

    `mean` over a row's tokens, `cls` its first token, `last` its last.
    """
    starts = torch.tensor([batch.starts[row] for row in rows], device=hidden.device)
    if pooling == "cls":
        return hidden[starts].float()
    lengths = torch.tensor([batch.lengths[row] for row in rows], device=hidden.device)
    if pooling == "last":
        return hidden[starts + lengths - 1].float()
    sums = [
        hidden[start : start + count * length].view(count, length, -1).sum(1, dtype=torch.float32)
        for start, count, length in _runs(batch, rows)
    ]
    return torch.cat(sums) / lengths[:, None]


def _runs(batch: PackedBatch, rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, count, length) of rows of one length that stand end to end, so that one call does."""
    start, count, length = -1, 0, -1
    for row in rows:
        if batch.lengths[row] == length and batch.starts[row] == start + count * length:
            count += 1
            continue
        if count:
            yield start, count, length
        start, count, length = batch.starts[row], 1, batch.lengths[row]
    if count:
        yield start, count, length


def critic_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (N, C), weight (C,) -> (N,) logits; the higher, the likelier a token is wrong."""
    return hidden.float() @ weight


def wrongness(logits: Tensor, calibration: Tensor | None) -> Tensor:
    """sigmoid(logit), through the 100-bucket table where there is one: bucket floor(100 p)."""
    p = torch.sigmoid(logits)
    if calibration is None:
        return p
    buckets = (p * CALIBRATION_BUCKETS).long().clamp(0, CALIBRATION_BUCKETS - 1)
    return calibration[buckets]


def sequence_scores(first: Tensor, head: SequenceHead) -> Tensor:
    """sigmoid(A * Wx + B) of first tokens: (R, C) -> (R,) in 0..1."""
    return torch.sigmoid(head.a * (first.float() @ head.weight) + head.b)


def likeliest_tokens(hidden: Tensor, wte: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """hidden (M, C), wte (V, C) -> the k likeliest ids and their log-probabilities, (M, k) each."""
    logprobs = F.log_softmax(hidden.float() @ wte.t(), dim=-1)
    best, ids = logprobs.topk(min(k, wte.shape[0]), dim=-1)
    return ids, best


def label_scores(pooled: Tensor, classifier: Classifier) -> Tensor:
    """pooled (R, C) -> (R, K) probabilities of the classifier's labels."""
    return F.linear(pooled, classifier.weight, classifier.bias).softmax(-1)
