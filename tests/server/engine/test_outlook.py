"""Outlook: how long a line may be, against the time that its last token would take."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.outlook import Demand, outlook

RATE = 1000.0
demands = st.lists(
    st.builds(
        lambda tokens, weight: Demand(tokens, weight, 0.0),
        st.floats(0.0, 5000.0),
        st.sampled_from([0.1, 1.0, 3.0]),
    ),
    max_size=12,
)


def served_before(others: list[Demand], longest: float, weight: float) -> float:
    """Tokens that are dealt until a line of this weight has had `longest` over it."""
    return longest * weight + sum(min(each.tokens, longest * each.weight) for each in others)


@given(demands, st.floats(1.0, 20_000.0))
def test_a_line_as_long_as_the_reach_is_done_just_in_time(
    others: list[Demand], capacity: float
) -> None:
    seen = outlook(others, capacity, RATE)
    if math.isinf(seen.reach):
        asked = sum(each.tokens for each in others)
        assert asked + seen.spare == pytest.approx(capacity)
    else:
        # The line is one of them, and asks for more than it may.
        longest = max(others, key=lambda each: each.tokens / each.weight)
        rest = [each for each in others if each is not longest]
        assert served_before(rest, seen.reach, longest.weight) == pytest.approx(capacity)


def test_lines_that_ask_for_little_take_no_more_than_that() -> None:
    little = [Demand(10.0, 1.0, 0.0)] * 100
    assert outlook([*little, Demand(1e6, 1.0, 0.0)], 2000.0, RATE).reach == 1000.0


def test_what_comes_takes_its_part_before_a_line_that_is_too_long() -> None:
    light = Demand(tokens=1000.0, weight=1.0, rate=500.0)
    seen = outlook([light, Demand(1e6, 1.0, 0.0)], 4000.0, RATE)
    assert seen.reach == 3000.0
    assert seen.slope == 1 / (RATE - 500.0)


def test_without_time_there_is_no_reach() -> None:
    assert outlook([Demand(10.0, 1.0, 0.0)], -5.0, RATE).reach == 0.0
    assert outlook([], 100.0, RATE) == (math.inf, 100.0, 1 / RATE)
