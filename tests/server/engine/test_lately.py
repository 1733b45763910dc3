"""Lately: what was given in the last seconds, and nothing older."""

import pytest

from server.engine.lately import PERIOD_S, Lately


def test_a_steady_line_has_its_rate_at_any_time() -> None:
    lately: Lately[str] = Lately()
    for tick in range(200):
        lately.note("steady", 100, 1000 + tick / 10)
        if tick / 10 > 2 * PERIOD_S:
            rates = lately.rates(1000 + tick / 10)
            assert rates["steady"] == pytest.approx(1000, rel=0.11)


def test_a_late_look_takes_nothing_for_more_than_it_was() -> None:
    lately: Lately[str] = Lately()
    lately.note("a", 100, 1000.0)
    lately.note("a", 100, 1000 + 1.9 * PERIOD_S)
    assert lately.rates(1000 + 3 * PERIOD_S)["a"] <= 200 / (2 * PERIOD_S)


def test_who_was_given_nothing_for_long_is_forgotten() -> None:
    lately: Lately[str] = Lately()
    lately.note("old", 100, 1000.0)
    lately.note("new", 100, 1000 + PERIOD_S)
    assert set(lately.rates(1000 + 1.5 * PERIOD_S)) == {"old", "new"}
    assert set(lately.rates(1000 + 2 * PERIOD_S)) == {"new"}


def test_after_a_pause_only_what_came_then_counts() -> None:
    lately: Lately[str] = Lately()
    lately.note("old", 100, 1000.0)
    lately.note("new", 100, 1000 + 10 * PERIOD_S)
    assert set(lately.rates(1000 + 10 * PERIOD_S)) == {"new"}
    assert lately.rates(1000 + 20 * PERIOD_S) == {}
