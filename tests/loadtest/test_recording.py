"""Latencies counted, merged and sent; digests judged; objectives."""

import json
import math
import random

import pytest

from loadtest.histogram import Histogram
from loadtest.recording import Recording
from loadtest.server_metrics import ServerMetrics
from loadtest.slo import Objectives, breaches
from loadtest.timeline import Judge, Timeline


def test_a_percentile_is_right_within_one_percent() -> None:
    rng = random.Random(1)
    values = [rng.lognormvariate(3, 1.5) for _ in range(10_000)]
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for percent in (1, 50, 90, 99, 99.9):
        exact = sorted(values)[math.ceil(len(values) * percent / 100) - 1]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.011)


def some(seed: int) -> Recording:
    rng, recording = random.Random(seed), Recording()
    for _ in range(500):
        at, ms = rng.uniform(0, 20), rng.lognormvariate(3, 1)
        recording.due(at)
        fault = "503 overloaded" if rng.random() < 0.1 else None
        name = rng.choice(["a", "b", None])
        recording.answered(
            rng.choice(["encode", "critic"]), at, ms, 0.1, names=[name], tokens=7, fault=fault
        )
    return recording


def test_workers_recordings_merge_to_what_one_process_would_have_recorded() -> None:
    whole = Recording()
    for seed in (1, 2):
        part = some(seed)
        whole.merge(Recording.from_json(json.loads(json.dumps(part.to_json()))))
    parts = [some(1), some(2)]
    assert whole.latencies().counts == parts[0].latencies().counts + parts[1].latencies().counts
    assert whole.faults == parts[0].faults + parts[1].faults
    for at in range(22):
        assert whole.seconds[at].tokens == sum(part.seconds[at].tokens for part in parts)
        assert whole.seconds[at].due == sum(part.seconds[at].due for part in parts)


def test_latency_stands_where_a_request_was_due_and_throughput_where_it_ended() -> None:
    recording = Recording()
    recording.due(1.5)
    recording.answered("encode", 1.5, 2000.0, 0.0, names=["a"], tokens=9)
    assert recording.seconds[1].latencies["encode"].count == 1
    assert recording.seconds[1].done == 0
    assert (recording.seconds[3].done, recording.seconds[3].tokens) == (1, 9)


@pytest.fixture
def moved() -> Timeline:
    """v1, then v2 asked for at 10 and answered at 12, then v1 again at 20 and 21."""
    timeline = Timeline()
    timeline.start("name", "v1")
    for digest, asked, answered in (("v2", 10, 12), ("v1", 20, 21)):
        timeline.asked("name", digest, asked)
        timeline.answered("name", digest, answered)
    return timeline


@pytest.mark.parametrize(
    ("digest", "sent", "received", "allowed"),
    [
        ("v1", 1, 2, True),
        ("v2", 1, 9, False),  # before the move was asked for
        ("v2", 9, 11, True),
        ("v1", 11, 13, True),  # sent before the move was answered
        ("v1", 13, 14, False),  # sent after it
        ("v1", 13, 20.5, True),  # back again meanwhile
        ("v2", 22, 23, False),
        ("v3", 22, 23, False),
    ],
)
def test_a_digest_is_right_only_while_the_name_may_mean_it(
    moved: Timeline, digest: str, sent: float, received: float, allowed: bool
) -> None:
    assert moved.allows("name", digest, sent, received) is allowed


def test_a_move_that_was_never_answered_leaves_both_possible() -> None:
    timeline = Timeline()
    timeline.start("name", "v1")
    timeline.asked("name", "v2", 10)
    assert timeline.allows("name", "v1", 50, 51)
    assert timeline.allows("name", "v2", 50, 51)


def test_an_answer_is_judged_only_when_news_had_time_to_come() -> None:
    timeline = Timeline()
    timeline.start("name", "v1")
    judge = Judge(timeline, settle_s=3)
    judge.note("name", "v2", sent=10.5, received=11)
    assert judge.settle(now=12) == []
    timeline.asked("name", "v2", at=10)  # the news was slow
    assert judge.settle(now=14) == []
    judge.note("name", "v9", sent=10.5, received=11)
    assert len(judge.settle(now=14)) == judge.wrong == 1


def recording_of(ms: float, failed: int = 0, fault: str = "503 overloaded") -> Recording:
    recording = Recording()
    for i in range(100):
        recording.answered("encode", 0.0, ms, 0.0, tokens=10, fault=fault if i < failed else None)
    return recording


@pytest.mark.parametrize(
    ("objectives", "recording", "missed"),
    [
        (Objectives(), recording_of(5), 0),
        (Objectives(p99_ms=4), recording_of(5), 1),
        (Objectives(p99_ms=6), recording_of(5), 0),
        (Objectives(), recording_of(5, failed=1), 1),
        (Objectives(error_rate=0.02), recording_of(5, failed=2), 0),
        (Objectives(error_rate=0.02), recording_of(5, failed=3), 1),
        (Objectives(min_tokens_per_s=999), recording_of(5), 0),
        (Objectives(min_tokens_per_s=1001), recording_of(5), 1),
        (Objectives(error_rate=1), recording_of(5, failed=1, fault="wrong: rows"), 1),
        (Objectives(error_rate=1), Recording(), 1),
    ],
)
def test_each_objective_is_missed_exactly_when_it_is(
    objectives: Objectives, recording: Recording, missed: int
) -> None:
    assert len(breaches(objectives, recording, wrong_samples=0)) == missed


def test_a_sample_unlike_its_reference_is_never_allowed() -> None:
    assert breaches(Objectives(error_rate=1), recording_of(5), wrong_samples=1)


def test_the_servers_metrics_become_rates_and_means() -> None:
    metrics = ServerMetrics()
    text = """# TYPE trunkline_tokens counter
trunkline_tokens_total{{kind="a"}} {a}
trunkline_tokens_total{{kind="b"}} {b}
# TYPE trunkline_wait histogram
trunkline_wait_bucket{{le="+Inf"}} {n}
trunkline_wait_sum {s}
trunkline_wait_count {n}
# TYPE other gauge
other 5
"""
    metrics.add(0.0, text.format(a=10, b=5, n=1, s=2.0))
    metrics.add(2.0, text.format(a=20, b=15, n=5, s=4.0))
    assert metrics.rates("trunkline_tokens_total") == [(1.0, 10.0)]
    assert metrics.means("trunkline_wait") == [(1.0, 0.5)]
    assert "other" not in metrics.values
