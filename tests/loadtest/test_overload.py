"""A server under an open loop beyond what it sustains: it answers, and says when to come again."""

from collections import Counter

import pytest

from loadtest.bench import fairness, overload
from loadtest.bench.client import Answer, Sent
from loadtest.bench.offered import Point, Span, point, table

ANSWERS = {200, 503, 504}
CONNECTIONS = 4


@pytest.mark.alone
def test_beyond_its_load_a_server_goes_on_answering_and_refuses_with_a_retry_after() -> None:
    # So few tokens may wait that the open loop meets a full queue, and the closed loop does not,
    # whose line may fill half of it.
    waiting = str(2 * CONNECTIONS * 512)
    measured = overload.run(
        1.0, (0.5, 3.0), connections=CONNECTIONS, settings=["--max-queue-tokens", waiting]
    )
    keys, adapters = measured.fairness.keys, measured.fairness.adapters
    for each in (*measured.curve, keys[0], adapters[0]):
        assert each.good > 0, each.name
    for each in (*measured.curve, *keys, *adapters):
        assert set(each.statuses) <= ANSWERS, each.statuses
        assert each.refused_without_time == 0, each.name
    assert measured.curve[-1].statuses[503] > 0
    assert "<svg" in overload.picture(measured)
    assert "<svg" in fairness.picture(measured.fairness)


def test_the_table_says_what_became_of_all_that_was_offered() -> None:
    half = Point("0.5", 10.0, 10.0, Counter({200: 100}), 0, [0.1] * 100)
    three = Point("3", 60.0, 18.0, Counter({200: 180, 503: 420}), 0, [0.1] * 90 + [2.0] * 90)
    lines = table([half, three], "times", "of the peak", ["0.56", "1.00"]).splitlines()
    assert lines[2:] == [
        "| 0.5 | 10 | 10 | 0.56 | none | 0.10 s | 0.10 s |",
        "| 3 | 60 | 18 | 1.00 | 420 × 503 | 2.00 s | 2.00 s |",
    ]


def test_goodput_is_what_is_answered_while_the_queue_is_full() -> None:
    def sent(due: float, done: float, status: int = 200, head: bytes = b"") -> Sent:
        return Sent(0, Answer(status, head, b""), due, done)

    loop = [
        sent(0.1, 1.2),  # due while the queue fills, answered later
        sent(1.5, 2.0),
        sent(2.0, 2.0, 503, b"Retry-After: 1"),
        sent(2.5, 2.5, 503),
        sent(2.9, 3.4),  # answered after the end
    ]
    counted = point("2", loop, Span.of(2.0))
    assert (counted.offered, counted.good) == (2.0, 1.0)
    assert counted.statuses == Counter({200: 2, 503: 2})
    assert counted.refused_without_time == 1
    assert counted.latencies == pytest.approx([0.5, 0.5])
    assert counted.answered == 0.5
