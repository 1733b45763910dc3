"""Sampled answers against a reference: the same row asked for alone, by its digest.

Under load a row stands in a batch with other adapters' rows while slots are written; alone, on a
quiet server, there is nothing it could be mixed up with. `--reference-url` asks another server
(float32 on a CPU beside a GPU, say) that has the same trunk.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import numpy as np

from loadtest.answers import Sample, values_of
from loadtest.population import LoadError, ask

# Largest distance of a row from itself alone: rounding of the dtype, far below the distance
# between two adapters. Embeddings: 1 - cosine; scores: absolute.
TOLERANCE = {
    "float32": {"embedding": 1e-5, "score": 1e-3},
    "bfloat16": {"embedding": 3e-4, "score": 3e-2},
}
ALONE = {"critic": "/critic", "classify": "/classify"}


@dataclass(frozen=True)
class Comparison:
    """compared rows; worst distances to their reference, and, to show that the comparison could
    fail, the median distance of sampled embeddings to the trunk without an adapter."""

    compared: int
    wrong: int
    worst_embedding: float
    worst_score: float
    median_to_base: float | None
    dtype: str

    @property
    def tells_adapters_apart(self) -> bool | None:
        """Whether another adapter's answer would have been found; None where that is not known."""
        if self.median_to_base is None:
            return None
        tolerance = TOLERANCE.get(self.dtype, TOLERANCE["bfloat16"])
        return self.median_to_base > 10 * tolerance["embedding"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(client: httpx.Client, samples: Sequence[Sample], dtype: str) -> Comparison:
    """Asks for every sample again, one at a time. dtype: of the server under load."""
    tolerance = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    worst = {"embedding": 0.0, "score": 0.0}
    wrong, to_base = 0, []
    for sample in samples:
        what = "score" if sample.kind in ALONE else "embedding"
        distance = _distance(sample, _alone(client, sample, sample.digest))
        worst[what] = max(worst[what], distance)
        wrong += distance > tolerance[what]
        if what == "embedding" and sample.name is not None:
            to_base.append(_distance(sample, _alone(client, sample, None)))
    median = float(np.median(to_base)) if to_base else None
    return Comparison(len(samples), wrong, worst["embedding"], worst["score"], median, dtype)


def _alone(client: httpx.Client, sample: Sample, digest: str | None) -> list[float]:
    reference = "base" if digest is None else f"{sample.name}@{digest}"
    path = ALONE.get(sample.kind, "/encode")
    answer = ask(client, "POST", path, json={"adapter": reference, "inputs": sample.text})
    return values_of(sample.kind, answer["data"][0])


def _distance(sample: Sample, alone: list[float]) -> float:
    under_load, reference = np.array(sample.values), np.array(alone)
    if under_load.shape != reference.shape:
        raise LoadError(f"the reference has {reference.shape}, the answer {under_load.shape}")
    if sample.kind in ALONE:
        return float(np.abs(under_load - reference).max())
    norms = np.linalg.norm(under_load) * np.linalg.norm(reference)
    return float(1 - under_load @ reference / norms)
