"""The soak's own judgement: what grows is found, and what is right is not called wrong."""

from collections import Counter

from loadtest.bench.soak.fleet import Name
from loadtest.bench.soak.report import is_sound, picture, summary, trends
from loadtest.bench.soak.samples import Sample


def samples(growth_mb: float) -> list[Sample]:
    return [
        {"at_s": 10.0 * n, "rss_mb": 500 + growth_mb * n, "threads": 20.0, "count_right": 5.0 * n}
        for n in range(100)
    ]


def test_what_grows_after_the_warm_up_fails_the_soak_and_is_named() -> None:
    flat, growing = samples(0.0), samples(0.1)
    assert is_sound(flat, Counter(), 200)
    assert not is_sound(growing, Counter(), 200)
    text = summary(growing, Counter(uploads=9), [], 200)
    assert "growing: rss_mb." in text
    assert "<svg" in picture(flat, 200)


def test_a_failed_request_or_a_wrong_answer_fails_the_soak() -> None:
    assert not is_sound(samples(0.0), Counter(failed=1), 200)
    assert not is_sound(samples(0.0), Counter(wrong=1), 200)
    assert is_sound(samples(0.0), Counter(refused=3), 200)


def test_growth_of_the_warm_up_is_not_judged() -> None:
    early = samples(0.0)
    for sample in early[:15]:
        sample["rss_mb"] = 100.0
    assert is_sound(early, Counter(), 200)
    assert {trend.column for trend in trends(early, 200)} >= {"rss_mb", "threads"}


def test_a_name_may_mean_what_is_uploaded_from_the_sending_to_the_answer_of_the_next() -> None:
    name = Name("a")
    name.sends("first", 1.0)
    name.uploaded("first", 1, 2.0)
    name.sends("second", 5.0)
    name.uploaded("second", 2, 6.0)
    assert name.may_mean("first", 3.0, 4.0)
    assert name.may_mean("first", 5.5, 5.8)
    assert not name.may_mean("first", 6.5, 7.0)
    assert name.may_mean("second", 5.2, 5.4)
    assert not name.may_mean("second", 3.0, 4.0)
