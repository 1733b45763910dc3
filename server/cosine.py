"""Cosines of pooled rows: what rerank and similarity answer."""

import numpy as np

from server.answers import Answered, EmbeddingForm, embedding_matrix
from server.engine.job import Floats


def cosines(answered: Answered) -> Floats:
    """(rows - 1,): the first row's cosine with each of the others.

    Raises NonFiniteResult where a row has no result.
    """
    unit = embedding_matrix(answered, EmbeddingForm())  # (rows, C)
    scores: Floats = np.clip(unit[1:] @ unit[0], -1.0, 1.0)
    return scores


def best_first(scores: Floats) -> list[int]:
    """Their places from the highest score to the lowest; equal ones keep their order."""
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order
