"""Every metric, declared once."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
        self.tokens = Counter(
            "trunkline_tokens", "Tokens run through the trunk.", registry=self.registry
        )
        self.batch_tokens = Histogram(
            "trunkline_batch_tokens", "Tokens of a batch.", buckets=_TOKENS, registry=self.registry
        )
        self.batch_rows = Histogram(
            "trunkline_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=self.registry
        )
        self.forward_seconds = Histogram(
            "trunkline_forward_seconds",
            "Time of a batch on the device.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.waiting_tokens = Gauge(
            "trunkline_waiting_tokens",
            "Tokens admitted and not answered yet.",
            registry=self.registry,
        )

    def batch(self, tokens: int, rows: int, seconds: float) -> None:
        self.tokens.inc(tokens)
        self.batch_tokens.observe(tokens)
        self.batch_rows.observe(rows)
        self.forward_seconds.observe(seconds)

    def request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
