"""Every metric, declared once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.top import TopAdapters

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


_RESIDENCY = {
    "adapters_registered": (GaugeMetricFamily, "Adapter names in the registry."),
    "adapters_resident": (GaugeMetricFamily, "Adapter versions in the slots."),
    "adapters_pinned": (GaugeMetricFamily, "Resident versions exempt from eviction."),
    "slot_bytes_used": (GaugeMetricFamily, "Bytes of the slots in use."),
    "slot_bytes_capacity": (GaugeMetricFamily, "Bytes of the slots."),
    "leases": (GaugeMetricFamily, "Adapter versions held by requests under way."),
    "adapter_loads": (CounterMetricFamily, "Adapter versions brought into the slots."),
    "adapter_evictions": (CounterMetricFamily, "Adapter versions evicted from the slots."),
}


class Residency(Collector):
    """Where the adapters are, read when it is asked for: `now` gives a value a name above."""

    def __init__(self, now: Callable[[], Mapping[str, float]]) -> None:
        self.now = now

    def collect(self) -> Iterator[Metric]:
        values = self.now()
        for name, (family, text) in _RESIDENCY.items():
            yield family(f"trunkline_{name}", text, value=values[name])

    def describe(self) -> Iterator[Metric]:
        """So that registering it reads nothing yet."""
        return iter(())


@dataclass(frozen=True)
class Ran:
    """A row that was run."""

    adapter: str
    tokens: int
    queue_s: float  # from its admission to its batch


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.adapters = TopAdapters()
        self.registry.register(self.adapters)
        self.requests = Counter(
            "trunkline_requests",
            "Answered requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "trunkline_request_seconds",
            "Time from receipt to answer by route.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._of_route: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self.tokens = Counter(
            "trunkline_tokens", "Tokens run through the trunk.", registry=self.registry
        )
        self.batch_tokens = Histogram(
            "trunkline_batch_tokens", "Tokens of a batch.", buckets=_TOKENS, registry=self.registry
        )
        self.batch_rows = Histogram(
            "trunkline_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=self.registry
        )
        self.tokenize_seconds = self._times("tokenize", "Time to tokenise a request's inputs.")
        self.queue_seconds = self._times("queue", "Time from a row's admission to its batch.")
        self.forward_seconds = self._times("forward", "Time of a batch on the device.")
        self.load_seconds = self._times(
            "adapter_load", "Time to bring an adapter version into the slots."
        )
        self.lag_seconds = self._times(
            "event_loop_lag", "How late the event loop is for a timer, four times a second."
        )
        self.waiting_tokens = Gauge(
            "trunkline_waiting_tokens",
            "Tokens admitted and not answered yet.",
            registry=self.registry,
        )
        self.answer_bytes = Gauge(
            "trunkline_answer_bytes",
            "Bytes of large answers that are computed, built or not read yet.",
            registry=self.registry,
        )

    def _times(self, name: str, text: str) -> Histogram:
        return Histogram(
            f"trunkline_{name}_seconds", text, buckets=_SECONDS, registry=self.registry
        )

    def watch_residency(self, now: Callable[[], Mapping[str, float]]) -> None:
        """Read the adapters' whereabouts from `now` at every exposition."""
        self.registry.register(Residency(now))

    def batch(self, rows: Sequence[Ran], seconds: float) -> None:
        """A batch that took so long on the device."""
        tokens = sum(row.tokens for row in rows)
        self.tokens.inc(tokens)
        self.batch_tokens.observe(tokens)
        self.batch_rows.observe(len(rows))
        self.forward_seconds.observe(seconds)
        for row in rows:
            self.queue_seconds.observe(row.queue_s)
            self.adapters.count(row.adapter, row.tokens)

    def request(self, route: str, status: int, seconds: float) -> None:
        key = (route, status)
        if key not in self._of_route:
            count, times = (
                self.requests.labels(route, str(status)),
                self.request_seconds.labels(route),
            )
            self._of_route[key] = count, times
        count, times = self._of_route[key]
        count.inc()
        times.observe(seconds)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
