"""Admission before a device of known rate: who is refused under overload, and what he is told."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY

from adapters.errors import NotFound
from server.engine.admission import LONGEST_RETRY_S, Admission, Row
from server.engine.errors import Overloaded
from server.engine.job import Ask, Job
from server.engine.lines import LineKey, line_key
from server.engine.permits import TokenPermits
from server.engine.queue import JobQueue
from server.engine.rate import HALF_LIFE_S, DrainRate

ASK = Ask(frozenset({"embedding"}))
RATE = 1000  # tokens a second
ROW = 50  # tokens


pytestmark = pytest.mark.usefixtures("event_loop")


class Device:
    """Admission and queue before a device that runs RATE tokens a second when told to."""

    def __init__(
        self,
        max_wait_s: float = 5.0,
        permits: int = 1 << 20,
        weights: dict[str, float] | None = None,
    ) -> None:
        self.leases = self.leases_taken = 0
        self.queue, self.rate = JobQueue(weights), DrainRate()
        self.rate.note(RATE * 10, 10.0)
        backbone: Any = SimpleNamespace(config=TINY, tensors={})
        self.admission = Admission(
            self, backbone, TokenPermits(permits), self.queue, self.rate, 1 << 20, max_wait_s
        )

    def version(self, name: str) -> Any:
        return SimpleNamespace(name=name, number=1, digest=name, manifest=None)

    def lease(self, name: str, key: str) -> Any:
        if name == "deleted meanwhile":
            raise NotFound(name)
        self.leases += 1
        self.leases_taken += 1
        return self.version(name), SimpleNamespace(release=self._release)

    def _release(self) -> None:
        self.leases -= 1

    def ask(
        self, adapter: str | None = None, key: str = "", rows: int = 1, timeout_s: float = 60
    ) -> list[Job]:
        row = Row(np.zeros(ROW, dtype=np.int64), adapter)
        jobs, _ = self.admission.admit([row] * rows, ASK, time.monotonic() + timeout_s, key)
        self.queue.put(jobs)
        return jobs

    def fill(self, adapter: str | None = None, key: str = "") -> tuple[int, Overloaded]:
        """Ask until refused: how many were admitted, and the refusal."""
        for admitted in range(100_000):
            try:
                self.ask(adapter, key)
            except Overloaded as error:
                return admitted, error
        raise AssertionError("nothing was ever refused")

    def run(self, seconds: float) -> list[Job]:
        """What the device answers in this time."""
        left, done = int(seconds * RATE), []
        while left >= ROW and len(self.queue):
            batch = self.queue.take(min(left, 512), lambda digest, key: SimpleNamespace())  # type: ignore[arg-type,return-value]
            for job in batch.jobs:
                job.release()
            left -= sum(job.tokens for job in batch.jobs)
            done += batch.jobs
        return done


def test_no_more_is_admitted_than_runs_in_the_longest_wait() -> None:
    device = Device(max_wait_s=5)
    admitted, _ = device.fill()
    assert admitted * ROW == pytest.approx(5 * RATE, abs=2 * ROW)


def test_a_row_whose_turn_comes_after_its_deadline_is_refused_at_once() -> None:
    device = Device(max_wait_s=5)
    for _ in range(60):  # 3 s of work
        device.ask()
    with pytest.raises(Overloaded):
        device.ask(timeout_s=2)
    device.ask(timeout_s=4)


@pytest.mark.parametrize("limit", [{"max_wait_s": 2}, {"max_wait_s": 1e9, "permits": 10 * RATE}])
def test_who_comes_again_after_the_retry_after_is_admitted(limit: dict[str, Any]) -> None:
    device = Device(**limit)
    _, error = device.fill()
    device.run(error.details["retry_after_s"])
    device.ask()


def test_the_retry_after_grows_with_the_excess_and_is_bounded() -> None:
    waits = []
    for seconds, rows in ((10, 2), (10, RATE * 4 // ROW), (10, RATE * 9 // ROW), (200, 2)):
        device = Device(max_wait_s=1e9, permits=RATE * seconds)
        device.ask(rows=RATE * seconds // ROW)
        with pytest.raises(Overloaded) as refused:
            device.ask(rows=rows)
        waits.append(refused.value.details["retry_after_s"])
    # A small one needs half of the queue to be done; a large one all of it.
    assert waits == [6, 9, 10, LONGEST_RETRY_S]


@pytest.mark.parametrize(("flood", "other"), [("adapter", "adapter"), ("key", "key")])
def test_who_floods_is_refused_and_others_are_served_soon(flood: str, other: str) -> None:
    device = Device(max_wait_s=2)
    _, error = device.fill(**{flood: "flooding"})
    assert error.details["retry_after_s"] >= 1
    for _ in range(5):
        device.ask(**{other: "quiet"})
    done = device.run(1.0)
    quiet = [job for job in done if "quiet" in (job.key, getattr(job.adapter, "name", ""))]
    assert len(quiet) == 5


@pytest.mark.parametrize("floods", [1, 5, 50])
def test_a_full_queue_has_room_for_who_asks_for_little(floods: int) -> None:
    device = Device(max_wait_s=1e9, permits=50 * RATE)
    pushing = [f"flood {number}" for number in range(floods)]
    while pushing:
        for key in list(pushing):
            try:
                device.ask(key=key)
            except Overloaded:
                pushing.remove(key)
    assert device.admission.crowded
    for _ in range(5):
        device.ask(key="quiet")
    assert device.admission.permits.free > 0


def test_one_line_fills_half_of_the_queue() -> None:
    device = Device(max_wait_s=1e9, permits=10 * RATE)
    admitted, _ = device.fill()
    assert admitted * ROW == pytest.approx(5 * RATE, abs=2 * ROW)


def test_a_refused_request_holds_nothing() -> None:
    device = Device(permits=4 * ROW)
    device.ask("first", rows=3)
    assert (device.leases, device.admission.permits.held) == (1, 3 * ROW)
    with pytest.raises(Overloaded):
        device.ask("second", rows=2)
    assert (device.leases, device.admission.permits.held) == (1, 3 * ROW)


def test_a_refusal_for_want_of_time_asks_for_no_lease() -> None:
    device = Device(max_wait_s=2)
    admitted, _ = device.fill("flooding")
    for _ in range(100):
        with pytest.raises(Overloaded):
            device.ask("flooding")
    assert device.leases_taken == admitted


def test_an_adapter_that_is_deleted_during_admission_keeps_no_permits() -> None:
    device = Device()
    device.ask("first")
    with pytest.raises(NotFound):
        device.ask("deleted meanwhile")
    assert (device.leases, device.admission.permits.held) == (1, ROW)


def test_an_idle_server_takes_any_request_and_one_that_knows_no_rate_too() -> None:
    device = Device(max_wait_s=0.001)
    device.ask(rows=1000)
    unknown = Device(max_wait_s=0.001)
    unknown.rate.__init__()  # type: ignore[misc]
    for _ in range(100):
        unknown.ask()


def test_the_rate_follows_the_device() -> None:
    rate = DrainRate()
    assert rate.seconds(1000) == 0
    rate.note(4000, 2.0)
    assert rate.seconds(1000) == pytest.approx(0.5)
    for _ in range(100):
        rate.note(1000, 1.0)
    assert rate.seconds(1000) == pytest.approx(1.0, rel=0.01)
    rate.note(int(HALF_LIFE_S * 3000), HALF_LIFE_S)
    assert 1 / 3 < rate.seconds(1000) < 1


def test_what_waits_is_counted_down_as_jobs_leave_by_any_way() -> None:
    device = Device(max_wait_s=60)
    jobs = [device.ask("a")[0] for _ in range(40)]
    line, base = line_key("", jobs[0].adapter), line_key("", None)

    def late_s(key: LineKey, waiting: int) -> float:
        return device.queue.lateness([key], waiting, RATE, 1.0)

    assert late_s(line, 40 * ROW) == pytest.approx(1.0)
    jobs[0].reply.abandoned = True
    for job in jobs[1:19]:
        job.deadline = 0.0
    device.queue.take(2 * ROW, lambda digest, key: SimpleNamespace())  # type: ignore[arg-type,return-value]
    assert late_s(line, 19 * ROW) == 0.0
    assert late_s(base, 19 * ROW) == 0.0


def test_what_is_on_the_device_is_before_everybody() -> None:
    device = Device(max_wait_s=60)
    for _ in range(40):
        device.ask("a")
    device.queue.take(40 * ROW, lambda digest, key: SimpleNamespace())  # type: ignore[arg-type,return-value]
    assert device.admission.permits.held == 40 * ROW
    assert device.queue.lateness([line_key("", None)], 40 * ROW, RATE, 1.5) == pytest.approx(0.5)


def test_others_that_ask_for_little_are_waited_for_no_longer_than_that() -> None:
    device = Device(max_wait_s=2)
    for number in range(20):  # a second's work
        device.ask(f"other {number}")
    admitted, _ = device.fill("one")
    assert admitted * ROW == pytest.approx(1 * RATE, abs=2 * ROW)


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_a_line_alone_has_the_whole_device_whatever_its_share(weight: float) -> None:
    device = Device(max_wait_s=2, weights={"one": weight})
    device.ask("one")
    device.run(1.0)
    admitted, _ = device.fill("one")
    assert admitted * ROW == pytest.approx(2 * RATE, abs=2 * ROW)


def test_the_first_after_a_flood_and_a_pause_are_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(max_wait_s=2)
    for number in range(20):
        device.ask(f"flood {number}", rows=2)
    device.run(60)
    began = time.monotonic()
    monkeypatch.setattr("server.engine.queue.time.monotonic", lambda: began + 3600)
    admitted, _ = device.fill("one")
    assert admitted * ROW == pytest.approx(2 * RATE, abs=2 * ROW)


def test_large_requests_leave_room_for_who_asks_for_little() -> None:
    device = Device(max_wait_s=1e9, permits=10 * RATE)
    for number in range(8):
        try:
            device.ask(f"large {number}", rows=RATE * 3 // ROW)
        except Overloaded:
            break
    device.ask("little")


def test_a_line_that_is_not_the_long_one_is_told_when_there_is_room() -> None:
    device = Device(max_wait_s=1e9, permits=10 * RATE)
    device.fill("long")
    with pytest.raises(Overloaded) as refused:
        device.ask("other", rows=RATE * 4 // ROW)
    device.run(refused.value.details["retry_after_s"])
    device.ask("other", rows=RATE * 4 // ROW)


@pytest.mark.parametrize("adapters", [1, 16, 64, 200])
@pytest.mark.parametrize("rows", [1, 64])
def test_a_key_fills_half_of_the_queue_over_however_many_adapters(adapters: int, rows: int) -> None:
    device = Device(max_wait_s=1e9, permits=40 * RATE)
    refused = 0
    for number in range(2000):
        try:
            device.ask(f"adapter {number % adapters}", "loud", rows)
        except Overloaded:
            refused += 1
            if refused == adapters:
                break
    assert refused
    held = device.admission.permits.of_key("loud")
    assert 0.8 * 20 * RATE < held <= 20 * RATE
    device.ask("adapter 0", "quiet", rows=100)
    assert device.admission.permits.of_key("quiet") == 100 * ROW


def test_one_fan_out_request_leaves_room_for_another_key() -> None:
    device = Device(max_wait_s=1e9, permits=40 * RATE)
    device.ask("any", "quiet")
    fan_out = [Row(np.zeros(ROW, dtype=np.int64), f"adapter {n % 64}") for n in range(390)]
    jobs, _ = device.admission.admit(fan_out, ASK, time.monotonic() + 60, "loud")
    device.queue.put(jobs)
    with pytest.raises(Overloaded):
        device.admission.admit(fan_out, ASK, time.monotonic() + 60, "loud")
    for number in range(20):
        device.ask(f"quiet {number}", "quiet")


def test_a_key_that_floods_is_told_when_there_is_room_for_it() -> None:
    device = Device(max_wait_s=1e9, permits=10 * RATE)
    device.ask("other", "other", rows=20)
    for number in range(1000):
        try:
            device.ask(f"adapter {number % 8}", "loud", rows=4)
        except Overloaded as error:
            device.run(error.details["retry_after_s"])
            device.ask(f"adapter {number % 8}", "loud", rows=4)
            return
    raise AssertionError("nothing was ever refused")


def test_within_its_key_a_line_that_floods_leaves_room_for_the_others() -> None:
    device = Device(max_wait_s=1e9, permits=400 * RATE)
    device.fill("flooding", "key")
    device.ask("quiet", "key")


def test_a_server_is_crowded_when_a_key_may_be_refused() -> None:
    device = Device(max_wait_s=1e9, permits=10 * RATE)
    device.ask("a", "one")
    assert not device.admission.crowded
    for number in range(1000):
        try:
            device.ask(f"adapter {number % 50}", "loud")
        except Overloaded:
            break
    assert device.admission.crowded
    assert device.admission.refusal(["a"], 1e9, "one") is None


def test_permits_that_are_given_back_are_forgotten_by_key() -> None:
    permits = TokenPermits(100)
    for number in range(5):
        permits.take(10, f"key {number}")
        permits.give_back(10, f"key {number}")
    assert (permits.held, dict(permits._of_key)) == (0, {})
