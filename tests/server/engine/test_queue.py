"""The queue: fair over adapters, no wait for a cold one but by its own jobs, nothing lost."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import Damaged
from adapters.slots import Slot
from adapters.validate import Manifest
from adapters.versions import Record, Version
from server.engine.deal import QUANTUM
from server.engine.job import Ask, Job, Reply
from server.engine.queue import JobQueue

ASK = Ask(frozenset({"embedding"}))


pytestmark = pytest.mark.usefixtures("event_loop")


def version(name: str, number: int = 1) -> Version:
    record = Record(Manifest(), {}, 1.0)
    return Version(name, number, f"sha256:{name}{number}", 1, 0.0, record)


def job(name: str | None, tokens: int, *, number: int = 1, late: bool = False) -> Job:
    deadline = time.monotonic() + (-1 if late else 60)
    adapter = version(name, number) if name else None
    ids = np.zeros(tokens, dtype=np.int64)
    return Job(ids, ASK, adapter, deadline, time.monotonic(), Reply(1), 0, lambda: None)


def slot(digest: str, key: str = "") -> Slot:
    return Slot(digest, None, None, 0.0)  # type: ignore[arg-type]


def names(jobs: list[Job]) -> Counter[str]:
    return Counter(job.adapter.name if job.adapter else "base" for job in jobs)


def tokens_by_name(jobs: list[Job]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for each in jobs:
        counts[each.adapter.name if each.adapter else "base"] += each.tokens
    return counts


def test_a_hot_adapter_does_not_starve_the_others() -> None:
    queue = JobQueue()
    queue.put([job("hot", 128) for _ in range(10_000)])
    queue.put([job("cold-a", 128), job("cold-b", 128), job(None, 128)])
    first = queue.take(4096, slot).jobs
    assert {"cold-a", "cold-b", "base"} <= set(names(first))
    assert sum(each.tokens for each in first) == 4096  # and no place in the batch stays empty


def test_backlogged_adapters_get_equal_tokens_whatever_their_rows_lengths() -> None:
    queue = JobQueue()
    queue.put([job("short", 16) for _ in range(4000)])
    queue.put([job("long", 500) for _ in range(400)])
    queue.put([job("middle", 130) for _ in range(1000)])
    sent: Counter[str] = Counter()
    for _ in range(20):
        sent += tokens_by_name(queue.take(4096, slot).jobs)
    fair = sum(sent.values()) / 3
    assert all(abs(count - fair) < 0.1 * fair for count in sent.values()), sent


def test_shares_weight_the_tokens() -> None:
    queue = JobQueue({"gold": 3.0})
    queue.put([job(name, 64) for name in ("gold", "plain") for _ in range(4000)])
    sent: Counter[str] = Counter()
    for _ in range(20):
        sent += tokens_by_name(queue.take(4096, slot).jobs)
    assert sent["gold"] / sent["plain"] == pytest.approx(3, rel=0.1)


def test_who_had_nothing_waiting_goes_before_a_flood_of_many_adapters() -> None:
    queue = JobQueue()
    flood = [f"flood-{number}" for number in range(100)]
    queue.put([job(name, 128) for name in flood for _ in range(100)])
    queue.take(100 * QUANTUM, slot)  # their first turns, as new lines
    queue.put([job("quiet", 128)])
    queue.put([job("other", 128)])
    first = queue.take(1024, slot).jobs
    assert [each.adapter.name for each in first[:2] if each.adapter] == ["quiet", "other"]


def test_who_was_served_as_new_waits_for_the_round_before_it_is_new_again() -> None:
    queue = JobQueue()
    queue.put([job(f"flood-{number}", 128) for number in range(8) for _ in range(1000)])
    sent: Counter[str] = Counter()
    for _ in range(64):
        queue.put([job("greedy", 128)])  # one as soon as the last was taken
        sent += tokens_by_name(queue.take(512, slot).jobs)
    assert sent["greedy"] <= 1.1 * sent["flood-0"]
    assert min(sent.values()) > 0.8 * sum(sent.values()) / 9


def test_a_cold_adapter_delays_only_its_own_jobs() -> None:
    queue = JobQueue()
    queue.put([job("cold", 10), job("warm", 10), job("cold", 10), job(None, 10)])
    resident = {"sha256:warm1"}
    taken = queue.take(100, lambda digest, key: slot(digest) if digest in resident else None)
    assert names(taken.jobs) == {"warm": 1, "base": 1}
    resident.add("sha256:cold1")
    assert names(queue.take(100, slot).jobs) == {"cold": 2}


def test_take_waits_until_a_load_has_ended() -> None:
    queue = JobQueue()
    queue.put([job("cold", 10)])
    loaded = threading.Event()
    taken = []
    thread = threading.Thread(
        target=lambda: taken.append(
            queue.take(9, lambda d, key: slot(d) if loaded.is_set() else None)
        )
    )
    thread.start()
    time.sleep(0.05)
    assert taken == []
    loaded.set()
    queue.wake()
    thread.join(10)
    assert names(taken[0].jobs) == {"cold": 1}


def test_a_failed_load_fails_only_its_own_jobs() -> None:
    def hold(digest: str, key: str) -> Slot:
        if "broken" in digest:
            raise Damaged("its file is damaged")
        return slot(digest)

    queue = JobQueue()
    queue.put([job("broken", 10), job("whole", 10), job("broken", 10)])
    taken = queue.take(100, hold)
    assert names(taken.jobs) == {"whole": 1}
    assert names([each for each, _ in taken.failed]) == {"broken": 2}
    assert len(queue) == 0


def test_late_and_abandoned_jobs_are_given_back_not_run() -> None:
    queue = JobQueue()
    gone = job("a", 10)
    gone.reply.abandoned = True
    queue.put([job("a", 10, late=True), gone, job("a", 10)])
    taken = queue.take(100, slot)
    assert len(taken.jobs) == 1
    assert len(taken.unwanted) == 2


def test_two_versions_of_one_name_wait_apart() -> None:
    queue = JobQueue()
    queue.put([job("a", 10, number=1), job("a", 10, number=2)])
    taken = queue.take(100, lambda digest, key: slot(digest) if digest.endswith("a2") else None)
    assert [each.adapter.number for each in taken.jobs if each.adapter] == [2]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, 2000)),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 3000),
)
def test_every_job_comes_out_once_in_its_adapter_s_order(
    rows: list[tuple[str | None, int]], budget: int
) -> None:
    queue = JobQueue()
    jobs = [job(name, tokens) for name, tokens in rows]
    queue.put(jobs)
    out: list[Job] = []
    while len(queue):
        batch = queue.take(budget, slot).jobs
        tokens = sum(each.tokens for each in batch)
        assert batch
        assert tokens <= budget or len(batch) == 1
        out += batch
    assert len(out) == len(jobs)
    for name in ("a", "b", "c", None):
        want = [each for each in jobs if (each.adapter.name if each.adapter else None) == name]
        got = [each for each in out if (each.adapter.name if each.adapter else None) == name]
        assert want == got
