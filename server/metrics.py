"""Every metric, declared once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.top import Keeps, TopAdapters, TopKeys

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


class StorageFaults(Collector):
    """What is wrong with the data folder, by kind; `now` counts each kind, 0 where all is well."""

    def __init__(self, now: Callable[[], Mapping[str, float]]) -> None:
        self.now = now

    def collect(self) -> Iterator[Metric]:
        text = "Adapter files or writes that are off, by kind; 0 where all is well."
        family = GaugeMetricFamily("trunkline_storage_faults", text, labels=["kind"])
        for kind, count in self.now().items():
            family.add_metric([kind], count)
        yield family

    def describe(self) -> Iterator[Metric]:
        """So that registering it reads nothing yet."""
        return iter(())


class _Families(Collector):
    """Families that were collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


@dataclass(frozen=True)
class Ran:
    """A row that was run."""

    adapter: str
    tokens: int
    queue_s: float  # from its admission to its batch
    key: str = ""  # the API key's id; "" is everybody without one


def _sums(rows: Sequence[Ran], by: Callable[[Ran], str]) -> dict[str, tuple[int, int]]:
    """Rows and tokens by what `by` gives: a batch has many rows and few adapters and keys."""
    sums: dict[str, tuple[int, int]] = {}
    for row in rows:
        name = by(row)
        count, tokens = sums.get(name, (0, 0))
        sums[name] = count + 1, tokens + row.tokens
    return sums


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.adapters = TopAdapters()
        self.registry.register(self.adapters)
        self.keys = TopKeys()
        self.registry.register(self.keys)
        ProcessCollector(registry=self.registry)  # of what the platform tells: on Linux all
        self._build: Metric | None = None
        self.requests = Counter(
            "trunkline_requests",
            "Answered requests by route, status and, of an error, its code.",
            ["route", "status", "code"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "trunkline_request_seconds",
            "Time from receipt to answer by route.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._of_route: dict[tuple[str, int, str], tuple[Counter, Histogram]] = {}
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

    def watch_storage(self, now: Callable[[], Mapping[str, float]]) -> None:
        """Read what is wrong with the data folder from `now` at every exposition."""
        self.registry.register(StorageFaults(now))

    def set_build(self, **facts: str) -> None:
        """What runs, as the labels of trunkline_build_info."""
        text = "What runs: versions, device, dtype and trunk."
        self._build = GaugeMetricFamily("trunkline_build_info", text, labels=list(facts))
        self._build.add_metric(list(facts.values()), 1)
        self.registry.register(_Families([self._build]))

    def batch(self, rows: Sequence[Ran], seconds: float) -> None:
        """A batch that took so long on the device."""
        tokens = sum(row.tokens for row in rows)
        self.tokens.inc(tokens)
        self.batch_tokens.observe(tokens)
        self.batch_rows.observe(len(rows))
        self.forward_seconds.observe(seconds)
        for row in rows:
            self.queue_seconds.observe(row.queue_s)
        for adapter, (count, its_tokens) in _sums(rows, lambda row: row.adapter).items():
            self.adapters.count(adapter, count, its_tokens)
        for key, (count, its_tokens) in _sums(rows, lambda row: row.key).items():
            if key:
                self.keys.ran(key, count, its_tokens)

    def request(
        self, route: str, status: int, seconds: float, code: str = "", key: str = ""
    ) -> None:
        """An answer; `code` is an error's, `key` the API key's id where the request came with one.

        Both have few values: the codes of the error table, and the keys of the server's file.
        """
        labels = (route, status, code)
        if labels not in self._of_route:
            count, times = (
                self.requests.labels(route, str(status), code),
                self.request_seconds.labels(route),
            )
            self._of_route[labels] = count, times
        count, times = self._of_route[labels]
        count.inc()
        times.observe(seconds)
        if key:
            self.keys.answered(key, refused=status >= 400)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def own_exposition(self, key: str, patterns: tuple[str, ...], keeps: Keeps) -> bytes:
        """The same for a key that is limited to adapters: what it used, and what its adapters ran.

        Nothing in it depends on other adapters or other keys, so totals of the process are left
        out, and its most used adapters are found among its own.
        """
        families = [*self.adapters.collect_own(patterns, keeps), *self.keys.collect_own(key)]
        families += [self._build] if self._build else []
        return generate_latest(_Families(families))
