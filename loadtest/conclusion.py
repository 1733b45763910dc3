"""The end of a run: samples asked for again, objectives, files."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from loadtest import population
from loadtest.answers import Sample
from loadtest.options import Settings
from loadtest.outcome import Outcome
from loadtest.profile import Profile
from loadtest.recording import Recording
from loadtest.reference import compare
from loadtest.report import write_report
from loadtest.server_metrics import ServerMetrics
from loadtest.slo import Objectives, breaches


def conclude(
    client: httpx.Client,
    settings: Settings,
    profile: Profile,
    recording: Recording,
    metrics: ServerMetrics,
    info: dict[str, Any],
) -> Outcome:
    """Ask for the samples again, hold the run against its objectives, write the report."""
    samples = [Sample(**sample) for sample in recording.samples]
    with ExitStack() as stack:
        reference = client
        if settings.reference_url:
            reference = stack.enter_context(
                population.open_client(settings.reference_url, settings.key)
            )
        comparison = compare(reference, samples, info["dtype"]) if samples else None
    objectives = Objectives(
        settings.p99_ms or None, settings.error_rate, settings.min_tokens_per_s or None
    )
    missed = breaches(objectives, recording, comparison.wrong if comparison else 0)
    outcome = Outcome(settings, profile, recording, metrics, info, comparison, missed)
    if settings.recording:
        Path(settings.recording).write_text(json.dumps(outcome.to_json()), "utf-8")
    if settings.report:
        write_report(outcome, Path(settings.report))
        print(f"report: {settings.report}", file=sys.stderr)
    return outcome
