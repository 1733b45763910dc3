"""Latencies counted in logarithmic buckets: 1 % wide, so a percentile is right within 1 %."""

import math
from collections import Counter
from collections.abc import Mapping

WIDTH = 1.01
SMALLEST_MS = 0.01
_LOG_WIDTH = math.log(WIDTH)


class Histogram:
    """Merges with others, and goes through JSON, without losing anything more."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts or {})

    def add(self, ms: float) -> None:
        self.counts[math.floor(math.log(max(ms, SMALLEST_MS) / SMALLEST_MS) / _LOG_WIDTH)] += 1

    def merge(self, other: "Histogram") -> None:
        self.counts.update(other.counts)

    @property
    def count(self) -> int:
        return self.counts.total()

    def percentile(self, percent: float) -> float:
        """The latency in ms that `percent` of all do not exceed; nan of none."""
        wanted = max(1, math.ceil(self.count * percent / 100))
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return float(SMALLEST_MS * WIDTH ** (bucket + 0.5))
        return math.nan

    def to_json(self) -> dict[str, int]:
        return {str(bucket): count for bucket, count in self.counts.items()}

    @classmethod
    def from_json(cls, counts: Mapping[str, int]) -> "Histogram":
        return cls({int(bucket): count for bucket, count in counts.items()})


def merged(histograms: "list[Histogram]") -> Histogram:
    total = Histogram()
    for histogram in histograms:
        total.merge(histogram)
    return total
