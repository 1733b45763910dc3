"""TopAdapters: what each of the most used adapters ran, and the rest together."""

import threading
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

MOST = 100  # adapters that have series of their own
OTHER = "other"


class TopAdapters(Collector):
    """Rows and tokens by adapter name, at most `most` names and `other`.

    Which are told apart is decided at each exposition. A series never goes down: one that joins
    the top begins at 0, one that leaves it is added to `other`.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._used: Counter[str] = Counter()  # rows ever, by name
        self._rows: Counter[str] = Counter()  # since the last exposition
        self._tokens: Counter[str] = Counter()
        self._shown: dict[str, list[int]] = {OTHER: [0, 0]}  # rows and tokens, by label

    def count(self, name: str, tokens: int) -> None:
        """One row."""
        with self._lock:
            self._rows[name] += 1
            self._tokens[name] += tokens

    def collect(self) -> Iterator[Metric]:
        rows = CounterMetricFamily(
            "trunkline_adapter_rows", "Rows run, by adapter.", labels=["adapter"]
        )
        tokens = CounterMetricFamily(
            "trunkline_adapter_tokens", "Tokens run, by adapter.", labels=["adapter"]
        )
        with self._lock:
            self._settle()
            for name, (its_rows, its_tokens) in self._shown.items():
                rows.add_metric([name], its_rows)
                tokens.add_metric([name], its_tokens)
        yield rows
        yield tokens

    def describe(self) -> Iterator[Metric]:
        """So that registering it settles nothing yet."""
        return iter(())

    def _settle(self) -> None:
        self._used.update(self._rows)
        top = {name for name, _ in self._used.most_common(self.most)}
        for name in set(self._shown) - top - {OTHER}:
            self._add(OTHER, *self._shown.pop(name))
        for name, count in self._rows.items():
            self._add(name if name in top else OTHER, count, self._tokens[name])
        self._rows.clear()
        self._tokens.clear()

    def _add(self, label: str, rows: int, tokens: int) -> None:
        so_far = self._shown.setdefault(label, [0, 0])
        so_far[0] += rows
        so_far[1] += tokens
