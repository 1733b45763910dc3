"""What a finished run comes to: everything its report shows, its summary, its exit code."""

from dataclasses import dataclass, field
from typing import Any

from loadtest.options import Settings
from loadtest.profile import Profile
from loadtest.recording import Recording
from loadtest.reference import Comparison
from loadtest.server_metrics import ServerMetrics
from loadtest.slo import tokens_per_s

PERCENTILES = (50, 90, 99, 99.9)


@dataclass(frozen=True)
class Outcome:
    """info: GET /info's; summary: the JSON line that is printed last."""

    settings: Settings
    profile: Profile
    recording: Recording
    metrics: ServerMetrics
    info: dict[str, Any]
    comparison: Comparison | None
    breaches: list[str]
    summary: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "summary", summary_of(self))

    @property
    def exit_code(self) -> int:
        return 1 if self.breaches else 0

    def to_json(self) -> dict[str, Any]:
        settings = self.settings.to_json() | {"key": ""}
        return {
            "summary": self.summary,
            "settings": settings,
            "profile": vars(self.profile),
            "recording": self.recording.to_json(),
            "metrics": vars(self.metrics),
            "info": self.info,
            "comparison": self.comparison.to_json() if self.comparison else None,
            "breaches": self.breaches,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Outcome":
        return cls(
            Settings(**data["settings"]),
            Profile(**data["profile"]),
            Recording.from_json(data["recording"]),
            ServerMetrics(**data["metrics"]),
            data["info"],
            Comparison(**data["comparison"]) if data["comparison"] else None,
            data["breaches"],
        )


def summary_of(outcome: Outcome) -> dict[str, Any]:
    recording = outcome.recording
    seconds = recording.seconds.values()
    done, failed = sum(s.done for s in seconds), sum(s.failed for s in seconds)
    span = max(1, len(recording.seconds))
    admin_faults = sum(1 for mark in recording.marks if mark.fault)
    return {
        "loop": "open" if outcome.settings.rate else "closed",
        "shape": outcome.profile.name,
        "seconds": span,
        "requests": done,
        "failed": failed,
        "wrong": recording.wrong() + (outcome.comparison.wrong if outcome.comparison else 0),
        "digests_judged": recording.judged,
        "samples_compared": outcome.comparison.compared if outcome.comparison else 0,
        "admin_deeds": len(recording.marks),
        "admin_failed": admin_faults,
        "requests_per_s": round(done / span, 2),
        "tokens_per_s": round(tokens_per_s(recording), 1),
        "latency_ms": _percentiles(recording, None),
        "by_kind_ms": {kind: _percentiles(recording, kind) for kind in recording.kinds()},
        "lag_p99_ms": round(recording.lag.percentile(99), 2),
        "faults": dict(recording.faults),
        "breaches": outcome.breaches,
        "exit_code": outcome.exit_code,
    }


def _percentiles(recording: Recording, kind: str | None) -> dict[str, float]:
    histogram = recording.latencies(kind)
    if not histogram.count:
        return {}
    return {f"p{p:g}": round(histogram.percentile(p), 2) for p in PERCENTILES}
