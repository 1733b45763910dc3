"""Measures of a trained model: accuracy, F1, ranks, precision, calibration."""

import numpy as np
import torch
from torch import Tensor

from model.heads import CALIBRATION_BUCKETS

PRIOR = 2.0  # pseudo-observations that hold an empty bucket at its own middle


def macro_f1(truth: Tensor, guess: Tensor, classes: int) -> float:
    """The mean over classes that occur in either of 2 tp / (2 tp + fp + fn)."""
    scores = []
    for label in range(classes):
        right = ((truth == label) & (guess == label)).sum().item()
        named = (truth == label).sum().item() + (guess == label).sum().item()
        if named:
            scores.append(2 * right / named)
    return sum(scores) / len(scores)


def area_under_roc(truth: Tensor, score: Tensor) -> float:
    """The chance that a positive scores above a negative, ties counting half."""
    _, place, counts = torch.unique(score, return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2).double()[place]  # 1-based, ties in the middle
    positives = int(truth.sum())
    negatives = len(truth) - positives
    above = rank[truth.bool()].sum().item() - positives * (positives + 1) / 2
    return above / (positives * negatives) if positives and negatives else float("nan")


def average_precision(truth: Tensor, score: Tensor) -> float:
    """The sum over thresholds of (recall - recall before) * precision."""
    order = score.argsort(descending=True)
    hits = truth[order].double().cumsum(0)
    last = torch.cat((score[order].diff() != 0, torch.tensor([True])))  # of its tie
    precision = (hits / torch.arange(1, len(hits) + 1))[last]
    recall = hits[last] / hits[-1].clamp(min=1)
    return (recall.diff(prepend=torch.zeros(1, dtype=recall.dtype)) * precision).sum().item()


def retrieval(queries: Tensor, pool: Tensor) -> dict[str, float]:
    """recall@1 and mean reciprocal rank of pool[i] for queries[i], by dot product; (N, C) each."""
    scores = queries @ pool.t()  # (N, N)
    right = scores.diagonal().unsqueeze(1)
    ranks = (scores > right).sum(1) + ((scores == right).sum(1) + 1) / 2  # ties: the middle
    return {"recall@1": (ranks == 1).double().mean().item(), "mrr": (1 / ranks).mean().item()}


def expected_calibration_error(wrong: Tensor, p: Tensor, bins: int = 15) -> float:
    """Mean over tokens of |share wrong - mean p| of the token's bin (Guo et al. 2017, eq. 3)."""
    place = (p * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.double)
    gap.index_add_(0, place, wrong.double() - p.double())
    return gap.abs().sum().item() / len(p)


def calibration_table(wrong: Tensor, p: Tensor) -> Tensor:
    """The share of wrong tokens in each bucket of p, made to rise: (100,) float32.

    Isotonic regression by pooling adjacent violators; a bucket of few tokens leans on its middle.
    """
    place = (p * CALIBRATION_BUCKETS).long().clamp(max=CALIBRATION_BUCKETS - 1).numpy()
    weight = np.bincount(place, minlength=CALIBRATION_BUCKETS) + PRIOR
    middle = (np.arange(CALIBRATION_BUCKETS) + 0.5) / CALIBRATION_BUCKETS
    hits = np.bincount(place, weights=wrong.double().numpy(), minlength=CALIBRATION_BUCKETS)
    blocks: list[tuple[float, float, int]] = []  # hits, weight, buckets
    for h, w in zip(hits + PRIOR * middle, weight, strict=True):
        block = (float(h), float(w), 1)
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
        blocks.append(block)
    values = [hits / weight for hits, weight, count in blocks for _ in range(count)]
    return torch.tensor(values, dtype=torch.float32).clamp(0, 1)
