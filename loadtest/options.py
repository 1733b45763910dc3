"""The load test's own flags, beside Locust's; the web UI shows them too."""

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

from loadtest.profile import PROFILES
from loadtest.questions import DEFAULT_MIX, KINDS

ARRIVALS = ("poisson", "constant")
DEFAULT_SECONDS = 120.0
DEFAULT_USERS = 8


@dataclass(frozen=True)
class Settings:
    """What a run asks for; every worker gets the master's."""

    shape: str = "soak"
    steps: int = 6
    rate: float = 0.0  # requests a second at the peak; 0: a closed loop
    arrivals: str = "poisson"
    think_ms: float = 0.0
    mix: str = ",".join(f"{kind}={weight}" for kind, weight in DEFAULT_MIX.items())
    adapters: int = 20
    names: str = ""
    rank: int = 8
    zipf: float = 1.0
    drift: float = 0.0
    base_share: float = 0.1
    length_median: float = 48.0
    length_sigma: float = 0.8
    texts: int = 4
    texts_share: float = 0.2
    burst_every: float = 0.0
    burst_seconds: float = 2.0
    burst_factor: float = 3.0
    swaps: float = 30.0
    check_share: float = 0.01
    reference_url: str = ""
    seed: int = 1
    key: str = ""
    request_timeout: float = 30.0
    clock_slack_ms: float = 0.0
    metrics_every: float = 1.0
    p99_ms: float = 0.0
    error_rate: float = 0.0
    min_tokens_per_s: float = 0.0
    report: str = "load-report.html"
    recording: str = ""
    keep: bool = False

    def weights(self) -> dict[str, float]:
        """The mix by kind. Raises ValueError, with the sentence, for one that can't be."""
        weights = {}
        for part in self.mix.split(","):
            kind, _, weight = part.partition("=")
            if kind not in KINDS:
                raise ValueError(f"--mix: {kind!r} is none of {', '.join(KINDS)}")
            weights[kind] = float(weight)
        return weights

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


HELP = {
    "shape": "How the load changes over --run-time.",
    "steps": "Steps of the shape `steps`.",
    "rate": "Open loop: requests a second at the peak, whatever the answers take. 0: closed loop.",
    "arrivals": "Of the open loop: poisson, or one every 1/rate seconds.",
    "think_ms": "Closed loop: mean pause of a user between an answer and the next request.",
    "mix": "Weights of the kinds of request.",
    "adapters": "Random adapters to push before the load.",
    "names": "Adapters that are there already, with commas; nothing is pushed or moved then.",
    "rank": "LoRA rank of the pushed adapters.",
    "zipf": "Exponent of the adapters' popularity; 0: all alike.",
    "drift": "Places that the popularity moves on in a minute: a hot set that drifts.",
    "base_share": "Share of requests without an adapter.",
    "length_median": "Median tokens of a text (log-normal, 4 to 512).",
    "length_sigma": "Sigma of the texts' log-normal lengths.",
    "texts": "Texts of an /encode request that has several.",
    "texts_share": "Share of /encode requests with several texts.",
    "burst_every": "Mean seconds between bursts; 0: none.",
    "burst_seconds": "Seconds of a burst.",
    "burst_factor": "Rate in a burst over the rate outside.",
    "swaps": "Deeds of the admin a minute: push, promote, roll back, load, unload. 0: none.",
    "check_share": "Share of answers compared with a reference after the load (300 at most).",
    "reference_url": "Another server with the same trunk to take the reference from.",
    "seed": "Of everything that is drawn.",
    "key": "API key (env TRUNKLINE_KEY).",
    "request_timeout": "Seconds after which a request counts as failed.",
    "clock_slack_ms": "Distributed over machines: how far their clocks may be apart.",
    "metrics_every": "Seconds between readings of the server's /metrics; 0: none.",
    "p99_ms": "SLO: exit 1 if the p99 of all requests is over it; 0 is none.",
    "error_rate": "SLO: exit 1 if a larger share of requests fails; 0 allows none.",
    "min_tokens_per_s": "SLO: exit 1 if fewer tokens are answered in a second; 0 is none.",
    "report": "The HTML report; empty: none.",
    "recording": "File for the run's counts as JSON: `python -m loadtest.report` draws them again.",
    "keep": "Leave the pushed adapters on the server.",
}
CHOICES = {"shape": PROFILES, "arrivals": ARRIVALS}
SECRET = {"key"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for field in fields(Settings):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        options: dict[str, Any] = {"help": f"{HELP[field.name]} [default: {default!r}]"}
        if field.name in SECRET:  # never shown in the web UI
            options |= {"env_var": "TRUNKLINE_KEY", "include_in_web_ui": False}
        if isinstance(default, bool):
            options["action"] = "store_true"
        else:
            options |= {"type": type(default), "choices": CHOICES.get(field.name)}
        parser.add_argument(flag, dest=field.name, default=default, **options)


def flags_text() -> str:
    """Every flag with its help and default; Locust's own --help knows only its own."""
    defaults = Settings().to_json()
    lines = [
        f"  --{name.replace('_', '-'):20} {HELP[name]} [default: {default!r}]"
        for name, default in defaults.items()
    ]
    return "\n".join(["flags of the load test, behind Locust's own:", *lines])


def settings_of(options: argparse.Namespace) -> Settings:
    defaults = asdict(Settings())
    return Settings(**{n: type(d)(getattr(options, n)) for n, d in defaults.items()})
