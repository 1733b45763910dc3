"""The queue shares by key first and by line within the key, held against a fluid reference."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.deal import COLD, GIVEN_BACK, MISFITS, QUANTUM
from server.engine.job import Ask, Job, Reply
from server.engine.queue import JobQueue

ASK = Ask(frozenset({"embedding"}))
BUDGET = 2048
FOREVER = 1e18
ADAPTERS = [1, 16, 64, 200]

pytestmark = pytest.mark.usefixtures("event_loop")


def job(key: str, adapter: str, tokens: int = 64, deadline: float = FOREVER) -> Job:
    version: Any = SimpleNamespace(name=adapter, number=1, digest=adapter)
    ids = np.zeros(tokens, dtype=np.int64)
    return Job(ids, ASK, version, deadline, 0.0, Reply(1), 0, lambda: None, key=key)


def slot(digest: str, key: str) -> Any:
    return SimpleNamespace()


def tokens_by_key(jobs: list[Job]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for each in jobs:
        counts[each.key] += each.tokens
    return counts


def fair_shares(asked: Mapping[Any, float], capacity: float) -> dict[Any, float]:
    """Max-min fair: nobody gets more than it asks, and what it leaves is shared by the others."""
    shares, left, rest = {}, capacity, sorted(asked, key=lambda each: asked[each])
    for number, each in enumerate(rest):
        shares[each] = min(asked[each], left / (len(rest) - number))
        left -= shares[each]
    return shares


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_a_key_over_many_adapters_has_no_more_than_a_key_over_one(adapters: int) -> None:
    queue = JobQueue()
    queue.put([job("many", f"a{number % adapters}") for number in range(4000)])
    queue.put([job("one", "b") for _ in range(4000)])
    sent: Counter[str] = Counter()
    for _ in range(40):
        sent += tokens_by_key(queue.take(BUDGET, slot).jobs)
    assert abs(sent["many"] - sent["one"]) <= 2 * QUANTUM


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_a_key_that_asks_for_little_is_in_the_next_batch(adapters: int) -> None:
    queue = JobQueue()
    queue.put([job("loud", f"a{number % adapters}") for number in range(4000)])
    for _ in range(20):
        queue.take(BUDGET, slot)
        quiet = job("quiet", "b")
        queue.put([quiet])
        queue.put([job("loud", f"new {number}") for number in range(adapters)])
        assert quiet in queue.take(BUDGET, slot).jobs


def test_one_request_over_many_adapters_holds_another_key_up_by_no_more_than_a_turn() -> None:
    queue = JobQueue()
    queue.put([job("loud", f"a{number % 64}", tokens=64) for number in range(2048)])
    queue.put([job("quiet", "b", tokens=QUANTUM)])
    first = [each.key for each in queue.take(BUDGET, slot).jobs]
    assert first.index("quiet") * 64 <= QUANTUM


asked_rows = st.lists(
    st.tuples(
        st.sampled_from(["k1", "k2", "k3"]),
        st.sampled_from([f"a{number}" for number in range(6)]),
        st.integers(1, 600),  # tokens of a row
        st.integers(1, 60),  # rows
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=25)
@given(asked_rows, st.integers(700, 5000), st.integers(1, 30))
def test_keys_and_lines_get_their_max_min_shares(
    asked: list[tuple[str, str, int, int]], budget: int, batches: int
) -> None:
    queue = JobQueue()
    want: Counter[str] = Counter()
    want_of: dict[str, Counter[str]] = defaultdict(Counter)
    longest = max(tokens for _, _, tokens, _ in asked)
    for key, adapter, tokens, rows in asked:
        queue.put([job(key, adapter, tokens) for _ in range(rows)])
        want[key] += tokens * rows
        want_of[key][adapter] += tokens * rows
    done = []
    for _ in range(batches):
        if len(queue):
            done += queue.take(budget, slot).jobs
    got = tokens_by_key(done)
    near = 2 * (QUANTUM + longest)  # a turn under way, and a row that did not fit
    for key, share in fair_shares(want, got.total()).items():
        assert abs(got[key] - share) <= near * len(want), (key, got, want)
        of_lines: Counter[str] = Counter()
        for each in done:
            if each.key == key and each.adapter:
                of_lines[each.adapter.name] += each.tokens
        for line, of_line in fair_shares(want_of[key], got[key]).items():
            assert abs(of_lines[line] - of_line) <= near * len(want_of[key])


@settings(max_examples=25)
@given(asked_rows, st.integers(700, 5000), st.sets(st.sampled_from(["a0", "a1", "a2"])))
def test_no_batch_is_less_than_full_while_rows_that_fit_wait(
    asked: list[tuple[str, str, int, int]], budget: int, cold: set[str]
) -> None:
    queue = JobQueue()
    jobs = [job(key, name, tokens) for key, name, tokens, rows in asked for _ in range(rows)]
    queue.put(jobs)
    left = {id(each): each for each in jobs}
    hot = [each for each in jobs if each.adapter and each.adapter.name not in cold]
    while hot:
        batch = queue.take(budget, lambda d, key: None if d in cold else slot(d, key)).jobs
        assert batch, "a cold line held others up"
        for each in batch:
            del left[id(each)]
        hot = [each for each in hot if id(each) in left]
        room = budget - sum(each.tokens for each in batch)
        heads: dict[tuple[str, str], Job] = {}
        for each in hot:
            assert each.adapter
            heads.setdefault((each.key, each.adapter.name), each)
        assert all(each.tokens > room for each in heads.values())
    for digest in cold:
        queue.loaded(digest)
    while len(queue):  # and nothing is lost
        for each in queue.take(budget, slot).jobs:
            del left[id(each)]
    assert not left


def test_a_key_whose_adapters_are_all_cold_holds_up_nobody_and_has_its_turn_when_one_is_there() -> (
    None
):
    queue, resident = JobQueue(), {"b"}

    def hold(digest: str, key: str) -> Any:
        return slot(digest, key) if digest in resident else None

    queue.put([job("cold", f"a{number % 8}") for number in range(64)])
    queue.put([job("warm", "b") for _ in range(200)])
    assert {each.key for each in queue.take(BUDGET, hold).jobs} == {"warm"}
    resident.add("a3")
    queue.loaded("a3")
    first = queue.take(BUDGET, hold).jobs
    assert [each.key for each in first[:8]] == ["cold"] * 8


def test_a_key_that_reloads_its_adapters_gains_no_turns_by_it() -> None:
    queue, resident = JobQueue(), {"b"}

    def hold(digest: str, key: str) -> Any:
        return slot(digest, key) if digest in resident else None

    queue.put([job("cold", f"a{number % 50}") for number in range(5000)])
    queue.put([job("warm", "b") for _ in range(5000)])
    sent: Counter[str] = Counter()
    for number in range(100):
        resident.symmetric_difference_update({f"a{number % 50}"})
        queue.loaded(f"a{number % 50}")
        sent += tokens_by_key(queue.take(BUDGET, hold).jobs)
    assert sent["cold"] <= sent["warm"] + 2 * QUANTUM


def test_thousands_of_lines_are_not_asked_for_their_slots_with_every_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.engine.queue.RETRY_S", FOREVER)
    queue, asked = JobQueue(), Counter[str]()

    def hold(digest: str, key: str) -> Any:
        asked[digest] += 1
        return None if digest.startswith("cold") else slot(digest, key)

    queue.put([job("loud", f"cold {number}") for number in range(3 * COLD)])
    queue.put([job("loud", "warm") for _ in range(2000)])
    for _ in range(6):
        assert queue.take(BUDGET, hold).jobs
    assert asked.total() == 3 * COLD + 6


def test_a_batch_looks_at_few_lines_though_thousands_wait() -> None:
    queue, asked = JobQueue(), Counter[str]()

    def hold(digest: str, key: str) -> Any:
        asked[digest] += 1
        return slot(digest, key)

    queue.put([job("loud", f"a{number}", tokens=100) for number in range(5000)])
    batch = queue.take(BUDGET, hold).jobs
    assert asked.total() <= len(batch) + MISFITS + 1


def test_jobs_that_nobody_waits_for_are_given_back_a_part_at_a_time() -> None:
    queue = JobQueue()
    gone = [job("left", "a", deadline=0.0) for _ in range(3 * GIVEN_BACK)]
    queue.put(gone)
    queue.put([job("quiet", "b")])
    back, ran = [], []
    while len(queue):
        taken = queue.take(BUDGET, slot)
        assert len(taken.unwanted) <= GIVEN_BACK
        back += taken.unwanted
        ran += taken.jobs
    assert (len(back), len(ran)) == (len(gone), 1)
