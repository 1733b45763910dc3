"""What the adapter sets are compared with: TF-IDF, and logistic regressions.

TF-IDF is of words and word pairs, sublinear, at most 60,000 features.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor


def tfidf(**options: Any) -> TfidfVectorizer:
    return TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=60_000, **options)


def tfidf_labels(texts: Sequence[str], labels: Sequence[str], test: Sequence[str]) -> list[str]:
    vectorizer = tfidf(min_df=2)
    features = vectorizer.fit_transform(texts)
    model = LogisticRegression(C=10, max_iter=300).fit(features, labels)
    return list(model.predict(vectorizer.transform(test)))


def linear_labels(rows: np.ndarray, labels: Sequence[str], test: np.ndarray) -> list[str]:
    """A logistic regression on rows of length 1, (N, C) and (M, C)."""
    return list(LogisticRegression(C=30, max_iter=300).fit(rows, labels).predict(test))


def tfidf_ranks(train: Sequence[str], left: Sequence[str], right: Sequence[str]) -> np.ndarray:
    """(N,) the rank, from 1, of right[i] for left[i] by cosine; ties in their middle."""
    vectorizer = tfidf().fit(train)
    scores = (vectorizer.transform(left) @ vectorizer.transform(right).T).toarray()
    return ranks(scores)


def ranks(scores: np.ndarray) -> np.ndarray:
    """(N, N) scores -> (N,) ranks of the diagonal in its row."""
    right = scores.diagonal()[:, None]
    middle: np.ndarray = (scores > right).sum(1) + ((scores == right).sum(1) + 1) / 2
    return middle


def window_scores(
    train: Sequence[tuple[list[str], list[bool]]], test: Sequence[tuple[list[str], list[bool]]]
) -> Tensor:
    """Of the test rows' words, by a logistic regression on two neighbours on each side."""
    hasher = FeatureHasher(2**18, input_type="string")
    x, x_test = (
        hasher.transform([features for words, _ in rows for features in _windows(words)])
        for rows in (train, test)
    )
    y = np.array([hit for _, hits in train for hit in hits])
    model = LogisticRegression(C=1, max_iter=200).fit(x, y)
    scores: Tensor = torch.from_numpy(model.decision_function(x_test))
    return scores


def _windows(words: list[str]) -> Iterator[list[str]]:
    w = ["<s>", "<s>", *(word.lower() for word in words), "</s>", "</s>"]
    for i in range(2, len(w) - 2):
        near = [f"{k:+d} {w[i + k]}" for k in range(-2, 3)]
        pairs = [f"a {w[i - 1]} {w[i]}", f"b {w[i]} {w[i + 1]}", f"c {w[i - 1]} {w[i + 1]}"]
        yield near + pairs
