"""Seeded workloads: what is drawn, and that it is drawn again."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from loadtest.profile import Profile
from loadtest.workload import PASSAGE, Bursts, Lengths, Passage, Popularity

SPANS = [(i, i + 1) for i in range(len(PASSAGE))]


def test_lengths_are_log_normal_around_their_median_and_clipped() -> None:
    lengths = Lengths(median=48, sigma=0.8, low=4, high=512)
    drawn = sorted(lengths.draw(rng) for rng in [random.Random(1)] for _ in range(20_001))
    assert drawn[0] >= 4
    assert drawn[-1] <= 512
    assert 46 <= drawn[10_000] <= 50
    # One sigma up is e^0.8 times the median, one down the same part of it
    assert 48 * 2.1 < drawn[int(20_001 * 0.8413)] < 48 * 2.35


def test_popularity_is_zipf() -> None:
    rng, popularity = random.Random(2), Popularity(100, 1.0, 0.0, seed=3)
    counts = Counter(popularity.draw(rng, at=0.0) for _ in range(50_000))
    by_rank = [counts[popularity.adapter_of_rank(rank, 0.0)] for rank in range(100)]
    harmonic = sum(1 / rank for rank in range(1, 101))
    for rank in (1, 2, 5, 10):
        expected = 50_000 / (rank * harmonic)
        assert by_rank[rank - 1] == pytest.approx(expected, rel=0.1)


def test_the_hot_set_drifts_by_one_place_at_a_time() -> None:
    popularity = Popularity(50, 1.0, drift_per_minute=6, seed=4)
    hottest = [popularity.adapter_of_rank(0, at) for at in range(0, 100, 10)]
    second = [popularity.adapter_of_rank(1, at) for at in range(0, 100, 10)]
    assert hottest[1:] == second[:-1]
    assert len(set(hottest)) == 10


def test_the_same_seed_draws_the_same_again() -> None:
    def drawn(seed: int) -> list[int]:
        rng, popularity = random.Random(seed), Popularity(1000, 1.0, 60, seed)
        return [popularity.draw(rng, at / 10) for at in range(200)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_bursts_raise_the_rate_in_windows_and_nowhere_else() -> None:
    bursts = Bursts(every_s=10, length_s=2, factor=3, seed=5)
    factors = [bursts.factor_at(at / 10) for at in range(20_000)]
    assert set(factors) == {1.0, 3.0}
    assert factors.count(3.0) / len(factors) == pytest.approx(2 / 12, rel=0.25)
    begins = [i for i, (a, b) in enumerate(pairwise(factors)) if (a, b) == (1.0, 3.0)]
    assert all(factors[i + 1 : i + 19] == [3.0] * 18 for i in begins[:-1])
    assert [bursts.factor_at(at / 10) for at in range(20_000)] == factors


def test_no_bursts_where_none_are_wanted() -> None:
    assert {Bursts(0, 2, 3, 1).factor_at(at) for at in range(100)} == {1.0}


@pytest.mark.parametrize("length", [1, 48, 512, 2000])
def test_a_text_has_the_tokens_that_were_asked_for(length: int) -> None:
    passage = Passage(PASSAGE, SPANS)  # a character is a token
    assert len(passage.cut(random.Random(length), length)) == length


def test_steps_go_up_to_the_peak() -> None:
    profile = Profile("steps", peak=60, seconds=60, steps=6)
    assert [profile.level(at) for at in range(0, 60, 10)] == [10, 20, 30, 40, 50, 60]
    assert profile.level(60) is None


def test_a_ramp_rises_evenly() -> None:
    profile = Profile("ramp", peak=100, seconds=50)
    assert [profile.level(at) for at in (0, 10, 25, 49)] == [0, 20, 50, 98]


def test_a_spike_is_in_the_middle_and_five_times_as_high() -> None:
    profile = Profile("spike", peak=50, seconds=100)
    assert [profile.level(at) for at in (0, 39, 40, 59, 60, 99)] == [10, 10, 50, 50, 10, 10]


@pytest.mark.parametrize("name", ["ramp", "steps", "soak", "spike"])
def test_plateaus_cover_the_whole_time(name: str) -> None:
    plateaus = Profile(name, peak=10, seconds=30, steps=5).plateaus()
    assert plateaus[0].begins == 0
    assert plateaus[-1].ends == 30
    assert all(a.ends == b.begins for a, b in pairwise(plateaus))
