"""What a load run leaves behind: counts by second, by kind, by adapter. Goes through JSON."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loadtest.histogram import Histogram, merged

MAX_SAMPLES = 300
MAX_ADAPTERS = 20_000


@dataclass
class Second:
    """`due` and latencies stand where requests were meant to start, the rest where they ended."""

    due: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    latencies: dict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))

    def merge(self, other: "Second") -> None:
        self.due += other.due
        self.done += other.done
        self.failed += other.failed
        self.tokens += other.tokens
        for kind, histogram in other.latencies.items():
            self.latencies[kind].merge(histogram)


@dataclass(frozen=True)
class Mark:
    """An admin's deed: at, in seconds from the beginning."""

    at: float
    action: str
    name: str
    version: int | None
    ms: float
    fault: str | None


@dataclass
class Recording:
    seconds: dict[int, Second] = field(default_factory=lambda: defaultdict(Second))
    adapters: dict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    faults: Counter[str] = field(default_factory=Counter)
    lag: Histogram = field(default_factory=Histogram)  # from the meant to the real start
    marks: list[Mark] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    judged: int = 0  # answers to bare names whose digest was checked against the timeline

    def due(self, at: float) -> None:
        self.seconds[int(at)].due += 1

    def answered(
        self,
        kind: str,
        at: float,
        ms: float,
        lag_ms: float,
        *,
        names: Iterable[str | None] = (),
        tokens: int = 0,
        fault: str | None = None,
    ) -> None:
        """at: the meant start. names: the adapters asked for."""
        end = self.seconds[int(at + ms / 1e3)]
        self.lag.add(lag_ms)
        if fault is not None:
            end.failed += 1
            self.faults[fault] += 1
            return
        end.done += 1
        end.tokens += tokens
        self.seconds[int(at)].latencies[kind].add(ms)
        for name in set(names):
            if len(self.adapters) < MAX_ADAPTERS or str(name) in self.adapters:
                self.adapters[name or "base"].add(ms)

    def latencies(self, kind: str | None = None) -> Histogram:
        """Of the whole run, of one kind or of all."""
        return merged(
            [
                histogram
                for second in self.seconds.values()
                for name, histogram in second.latencies.items()
                if kind in (None, name)
            ]
        )

    def kinds(self) -> list[str]:
        return sorted({kind for second in self.seconds.values() for kind in second.latencies})

    def between(self, begins: float, ends: float) -> Second:
        """The seconds that begin in [begins, ends), summed up."""
        total = Second()
        for at, second in self.seconds.items():
            if begins <= at < ends:
                total.merge(second)
        return total

    def wrong(self) -> int:
        """Answers that were not what was asked for, whatever their status."""
        return sum(count for fault, count in self.faults.items() if fault.startswith("wrong"))

    def merge(self, other: "Recording") -> None:
        for at, second in other.seconds.items():
            self.seconds[at].merge(second)
        for name, histogram in other.adapters.items():
            self.adapters[name].merge(histogram)
        self.faults.update(other.faults)
        self.lag.merge(other.lag)
        self.marks += other.marks
        self.samples += other.samples[: max(0, MAX_SAMPLES - len(self.samples))]
        self.judged += other.judged

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": {
                str(at): {
                    "due": s.due,
                    "done": s.done,
                    "failed": s.failed,
                    "tokens": s.tokens,
                    "latencies": {kind: h.to_json() for kind, h in s.latencies.items()},
                }
                for at, s in self.seconds.items()
            },
            "adapters": {name: h.to_json() for name, h in self.adapters.items()},
            "faults": dict(self.faults),
            "lag": self.lag.to_json(),
            "marks": [vars(mark) for mark in self.marks],
            "samples": self.samples,
            "judged": self.judged,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Recording":
        recording = cls(
            faults=Counter(data["faults"]),
            lag=Histogram.from_json(data["lag"]),
            marks=[Mark(**mark) for mark in data["marks"]],
            samples=data["samples"],
            judged=data["judged"],
        )
        for at, s in data["seconds"].items():
            second = recording.seconds[int(at)]
            second.due, second.done = s["due"], s["done"]
            second.failed, second.tokens = s["failed"], s["tokens"]
            for kind, counts in s["latencies"].items():
                second.latencies[kind] = Histogram.from_json(counts)
        for name, counts in data["adapters"].items():
            recording.adapters[name] = Histogram.from_json(counts)
        return recording
