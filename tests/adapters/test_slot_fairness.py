"""One API key's flood of loads against a quiet key: order of loads, evictions, bounds.

The pool is the real one; its loader is driven by the test, so that time and order are exact.
"""

from collections.abc import Iterator

import pytest
from test_slots import adapter, digest, pool_for

from adapters.errors import Damaged, PoolFull
from adapters.load_failures import MOST_FAILURES, LoadFailures
from adapters.load_queue import MOST_FOR_JOBS, MOST_PRELOADS, LoadQueue
from adapters.slot import MOST_USES, Uses
from adapters.slots import FRESH_S, SlotPool

SLOTS, FLOOD = 8, 200
LOAD_S = 0.01
SET = adapter(0)


class Bench:
    """A pool in simulated time: each load takes LOAD_S, the device uses what is loaded at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slots: int = SLOTS) -> None:
        self.now = 1000.0
        for module in ("slots", "slot_table"):
            monkeypatch.setattr(f"adapters.{module}.time.monotonic", lambda: self.now)
        self.pool: SlotPool = pool_for(slots, lambda name: SET, debug=False)
        self.pool.close()  # ends the loader's thread
        self.pool._closed = False
        self.loaded: list[str] = []

    def use(self, seed: int, key: str) -> bool:
        """A batch under this adapter; False: it is not resident, and wanted now."""
        slot = self.pool.hold(digest(seed), key)
        if slot is not None:
            self.pool.let_go([slot])
        return slot is not None

    def load(self, used: bool = True) -> str:
        """The next load that finds room, and a batch under it; one without room lets others go."""
        for _ in range(3):
            picked = self.pool._pick()
            assert picked is not None
            key, load, _ = picked
            if self.pool._try(*picked):
                self.now += LOAD_S
                self.loaded.append(load.digest)
                assert not used or self.use(int(load.digest[-8:], 16), key)
                return load.digest
        raise AssertionError("no load found room")

    def flood(self, keys: tuple[str, ...] = ("flood",)) -> None:
        """Every adapter of each flooding key is asked for."""
        for number, key in enumerate(keys):
            for seed in range(1000 * number, 1000 * number + FLOOD):
                self.use(seed, key)

    def wait_for(self, seed: int, key: str) -> int:
        """Use an adapter; the loads that it waited for, its own one included."""
        before = len(self.loaded)
        while not self.use(seed, key):
            self.load()
        return len(self.loaded) - before


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    return Bench(monkeypatch)


@pytest.mark.parametrize("keys", [("flood",), tuple("abcd")])
def test_a_quiet_key_keeps_its_adapter_beside_floods(bench: Bench, keys: tuple[str, ...]) -> None:
    """25 loads of others come between two of its uses: one load, as if it was alone."""
    quiet = 9000
    waits = []
    for _ in range(12):
        waits.append(bench.wait_for(quiet, "quiet"))
        bench.flood(keys)
        for _ in range(25):
            bench.load()
        bench.now += 1.75
    assert bench.loaded.count(digest(quiet)) == 1
    assert waits[0] <= len(keys) + 1
    assert waits[1:] == [0] * 11


def test_a_cold_load_waits_for_few_loads_whatever_the_flood(bench: Bench) -> None:
    bench.flood()
    waits = [bench.wait_for(9000 + n, "quiet") for n in range(30)]
    assert max(waits) <= 2


def test_a_key_above_its_share_evicts_its_own_and_gives_to_one_below(bench: Bench) -> None:
    """Two keys that both ask for everything end with half of the slots each."""
    bench.flood(("one", "two"))
    for _ in range(100):
        bench.load()
    seeds = [int(name.removeprefix("sha256:"), 16) for name in bench.pool._table.slots]
    assert sorted(seed // 1000 for seed in seeds) == [0] * 4 + [1] * 4


def test_memory_of_a_key_that_went_away_is_used_by_the_others(bench: Bench) -> None:
    for seed in range(4):
        bench.wait_for(9000 + seed, "gone")
    bench.now += 61
    bench.flood()
    for _ in range(SLOTS):
        bench.load()
    assert not any(bench.pool.is_resident(digest(9000 + seed)) for seed in range(4))


def test_fresh_slots_of_one_key_delay_no_other_key(bench: Bench) -> None:
    """They were loaded for jobs and not used yet, so loads of their own key can't evict them."""
    for seed in range(SLOTS):
        bench.pool.want(digest(seed), key="flood")
        bench.load(used=False)
    bench.pool.want(digest(100), key="flood")  # it has to wait
    for seed in range(3):
        bench.pool.want(digest(9000 + seed), key="quiet")
        assert bench.load(used=False) == digest(9000 + seed)  # without a wait
    assert bench.now < 1000 + FRESH_S
    kept = sum(bench.pool.is_resident(digest(seed)) for seed in range(SLOTS))
    assert kept == SLOTS - 3


def test_a_key_whose_slots_are_in_every_batch_gives_one_up_when_the_batch_ends(
    bench: Bench,
) -> None:
    """Else a load would have to come between two batches, and a quiet key might wait for ever."""
    bench.flood()
    for _ in range(SLOTS):
        bench.load()
    held = [bench.pool.hold(name, "flood") for name in bench.loaded]
    assert all(held)
    bench.pool.want(digest(9000), key="quiet")
    for _ in range(2):  # the flood's next load, then the quiet key's
        picked = bench.pool._pick()
        assert picked is not None
        assert not bench.pool._try(*picked)
    assert bench.pool.stats().leaving == 1  # one slot is enough
    bench.pool.let_go([slot for slot in held if slot is not None])
    assert bench.load(used=False) == digest(9000)


def test_a_slot_that_two_keys_use_stays_when_one_of_them_floods(bench: Bench) -> None:
    shared = 0
    bench.wait_for(shared, "quiet")
    bench.flood()
    for _ in range(50):
        bench.load()
        bench.use(shared, "flood")
    assert bench.loaded.count(digest(shared)) == 1
    bench.use(shared, "quiet")


def test_a_digest_of_two_keys_is_loaded_once_at_the_first_of_their_turns(bench: Bench) -> None:
    for seed in (1, 2, 3):
        bench.pool.want(digest(seed), key="one")
    bench.pool.want(digest(3), key="two")
    assert [bench.load() for _ in range(3)] == [digest(seed) for seed in (1, 3, 2)]
    assert len(bench.pool._wanted) == 0


def test_loads_for_jobs_go_before_loads_ahead_of_the_same_key(bench: Bench) -> None:
    bench.pool.want(digest(1), for_jobs=False, key="one")
    bench.pool.want(digest(2), key="one")
    assert [bench.load() for _ in range(2)] == [digest(2), digest(1)]


def test_loads_that_one_key_has_waiting_are_bounded_and_others_are_not_refused(
    bench: Bench,
) -> None:
    for seed in range(MOST_PRELOADS):
        bench.pool.want(digest(seed), for_jobs=False, key="one")
    with pytest.raises(PoolFull, match="wait already"):
        bench.pool.want(digest(MOST_PRELOADS), for_jobs=False, key="one")
    bench.pool.want(digest(0), for_jobs=False, key="one")  # it waits already
    bench.pool.want(digest(MOST_PRELOADS), for_jobs=False, key="two")
    bench.pool.want(digest(MOST_PRELOADS), key="one")  # a request is not a load ahead


def test_nothing_is_kept_of_keys_names_and_failures_of_the_past() -> None:
    queue, failures, uses = LoadQueue(), LoadFailures(), Uses()
    for number in range(5000):
        queue.add(digest(number), True, "one", ())
        queue.add(digest(number), True, f"key{number}", ())
        failures.note(digest(number), Damaged("gone"))
        uses.add([(f"name{number}", 1)])
    assert len(queue._lines["one"].for_jobs) == MOST_FOR_JOBS
    for number in range(5000):
        queue.drop(digest(number))
    assert (len(queue), queue._lines) == (0, {})
    assert len(failures) <= MOST_FAILURES
    assert len(list(uses)) == MOST_USES
    assert not uses.gone


def test_a_slot_that_is_gone_counts_for_no_key(bench: Bench) -> None:
    for number in range(50):
        bench.wait_for(number, f"key{number}")
    for number in range(50):
        bench.pool.evict(digest(number))
    holdings = bench.pool._table._holdings
    assert (holdings._bytes, holdings._by_key, holdings._all) == ({}, {}, {})
