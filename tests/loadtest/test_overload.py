"""A server under an open loop beyond what it sustains: it answers, and says when to come again."""

from collections import Counter

from loadtest.bench import fairness, overload
from loadtest.bench.offered import Point, table

ANSWERS = {200, 503, 504}
CONNECTIONS = 4


def test_beyond_its_load_a_server_goes_on_answering_and_refuses_with_a_retry_after() -> None:
    # So few tokens may wait that the open loop meets a full queue, and the closed loop does not.
    waiting = str(CONNECTIONS * 512)
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
    lines = table([half, three], "times").splitlines()
    assert lines[2:] == [
        "| 0.5 | 10 | 10 | 0.56 | none | 0.10 s | 0.10 s |",
        "| 3 | 60 | 18 | 1.00 | 420 × 503 | 2.00 s | 2.00 s |",
    ]
