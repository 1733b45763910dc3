"""The server's own metrics, read while the load goes on."""

from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "trunkline_"
LEFT_OUT = ("_bucket", "_created")


@dataclass
class ServerMetrics:
    """Values by sample name, labels summed up, at times in seconds from the beginning."""

    times: list[float] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)  # by family: counter, gauge, histogram
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, at: float, exposition: str) -> None:
        sums: dict[str, float] = {}
        for metric in text_string_to_metric_families(exposition):
            if not metric.name.startswith(PREFIX):
                continue
            self.kinds[metric.name] = metric.type
            for sample in metric.samples:
                if not sample.name.endswith(LEFT_OUT):
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        for name in sums:  # a metric that came later was 0 before
            self.values.setdefault(name, [0.0] * len(self.times))
        for name, series in self.values.items():
            series.append(sums.get(name, 0.0))
        self.times.append(at)

    def rates(self, name: str) -> list[tuple[float, float]]:
        """(middle of two readings, increase a second); a restart of the server counts as 0."""
        return [
            ((a + b) / 2, max(0.0, later - earlier) / (b - a))
            for a, b, earlier, later in self._steps(name)
        ]

    def means(self, family: str) -> list[tuple[float, float]]:
        """Of a histogram: the mean of what two readings have between them, where that is any."""
        pairs = zip(self._steps(f"{family}_sum"), self._steps(f"{family}_count"), strict=True)
        return [
            ((a + b) / 2, (sum_b - sum_a) / (count_b - count_a))
            for (a, b, sum_a, sum_b), (_, _, count_a, count_b) in pairs
            if count_b > count_a
        ]

    def _steps(self, name: str) -> list[tuple[float, float, float, float]]:
        series = self.values[name]
        return [
            (self.times[i], self.times[i + 1], series[i], series[i + 1])
            for i in range(len(series) - 1)
            if self.times[i + 1] > self.times[i]
        ]
