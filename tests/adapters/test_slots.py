"""Arena, slots and leases: bounded, exactly once, never written while in use."""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.arena import ALIGNMENT, Arena
from adapters.errors import Damaged, Invalid
from adapters.format import AdapterSet
from adapters.host_tier import HostTier
from adapters.leases import LeaseBook
from adapters.load_failures import FAILURE_S
from adapters.slots import SlotPool
from adapters.weights import placed_bytes, weights_of
from model.config import GPTConfig
from model.lora import AdapterWeights

CPU = torch.device("cpu")
METADATA = {"lora_alpha": "8.0", "labels": '["a", "b", "c"]'}


def adapter(seed: int, config: GPTConfig = TINY, **options) -> AdapterSet:
    tensors = random_adapter(config, seed, **options)
    return AdapterSet(tensors, METADATA, f"sha256:{seed:064x}")


def digest(seed: int) -> str:
    return f"sha256:{seed:064x}"


def seed_of(name: str) -> int:
    return int(name.removeprefix("sha256:"), 16)


def pool_for(
    count: int,
    read: Callable[[str], AdapterSet] = lambda name: adapter(seed_of(name)),
    **options,
) -> SlotPool:
    """A pool with room for `count` adapters of rank 4."""
    size = placed_bytes(adapter(0), torch.float32)
    defaults = {"capacity_bytes": size * count, "max_slots": 0, "read": read, "debug": True}
    return SlotPool(TINY, torch.float32, CPU, **defaults | options)


@pytest.fixture
def pools():
    """Makes pools that are closed at the end."""
    made: list[SlotPool] = []

    def make(*arguments, **options) -> SlotPool:
        made.append(pool_for(*arguments, **options))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def all_tensors(weights: AdapterWeights) -> list[torch.Tensor]:
    parts = [tensor for pair in weights.lora.values() for tensor in pair]
    parts += [tensor for pair in weights.norms.values() for tensor in pair if tensor is not None]
    parts += [weights.critic] if weights.critic is not None else []
    if weights.classifier is not None:
        parts += [weights.classifier.weight, weights.classifier.bias]
    if weights.sequence_head is not None:
        parts += [getattr(weights.sequence_head, name) for name in ("weight", "a", "b")]
    return parts + ([] if weights.cls_embedding is None else [weights.cls_embedding])


def assert_same_weights(one: AdapterWeights, two: AdapterWeights) -> None:
    for left, right in zip(all_tensors(one), all_tensors(two), strict=True):
        assert torch.equal(left, right)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 900)), max_size=60))
def test_arena_extents_never_overlap_and_all_bytes_come_back(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(4096, CPU)
    held = []
    for allocate, number in steps:
        if allocate:
            extent = arena.allocate(number)
            if extent is None:
                assert all(gap.bytes < number for gap in arena._free)
            else:
                held.append(extent)
        elif held:
            arena.free(held.pop(number % len(held)))
        spans = sorted((extent.start, extent.end) for extent in held)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert all(start % ALIGNMENT == 0 for start, _ in spans)
        assert sum(extent.bytes for extent in held) + arena.free_bytes == arena.capacity
    for extent in held:
        arena.free(extent)
    assert arena.free_bytes == arena.capacity
    assert len(arena._free) == 1


def test_freed_extents_are_poisoned_with_nan_in_debug_mode(pools) -> None:
    pool = pools(2)
    pool.load_now(digest(1), 10)
    slot = pool.hold(digest(1))
    assert slot is not None
    pool.let_go([slot])
    assert all(torch.isfinite(tensor).all() for tensor in all_tensors(slot.weights))
    pool.evict(digest(1))
    assert all(torch.isnan(tensor).all() for tensor in all_tensors(slot.weights))


def test_a_slot_has_exactly_the_adapter_s_weights(pools) -> None:
    full = {"norms": True, "critic": True, "classes": 3, "ranks": {(1, "mlp.lora_fc"): 7}}
    full |= {"sequence": True, "cls": True}
    pool = pools(4, lambda name: adapter(seed_of(name), **full))
    pool.load_now(digest(3), 10)
    slot = pool.hold(digest(3))
    assert slot is not None
    expected = weights_of(
        adapter(3, **full), TINY, torch.float32, lambda tensor, dtype: tensor.to(dtype)
    )
    assert_same_weights(slot.weights, expected)
    assert len(all_tensors(expected)) == len(adapter(3, **full).tensors)
    assert slot.extent.bytes == placed_bytes(adapter(3, **full), torch.float32)


def test_a_held_slot_is_not_written_until_it_is_let_go(pools) -> None:
    pool = pools(1)
    pool.load_now(digest(1), 10)
    slot = pool.hold(digest(1))
    assert slot is not None
    before = [tensor.clone() for tensor in all_tensors(slot.weights)]
    pool.want(digest(2))  # needs the only slot
    pool.evict(digest(1))  # and an administrator wants it away
    assert not pool.is_resident(digest(1))
    time.sleep(0.1)
    assert not pool.is_resident(digest(2))
    for was, tensor in zip(before, all_tensors(slot.weights), strict=True):
        assert torch.equal(was, tensor)
    pool.let_go([slot])
    assert pool.load_now(digest(2), 10)
    assert pool.stats().held == pool.stats().leaving == 0


def test_the_least_recently_used_goes_first_and_pins_stay(pools) -> None:
    pool = pools(4)
    for seed in (1, 2, 3, 4):
        pool.load_now(digest(seed), 10)
    pool.keep({digest(1)})
    pool.let_go([pool.hold(digest(2))])
    pool.load_now(digest(5), 10)
    assert [s for s in range(1, 6) if pool.is_resident(digest(s))] == [1, 2, 4, 5]
    for seed in range(10, 20):
        pool.load_now(digest(seed), 10)
    assert pool.is_resident(digest(1))
    pool.keep(())
    for seed in range(20, 24):
        pool.load_now(digest(seed), 10)
    assert not pool.is_resident(digest(1))


def test_the_count_of_slots_is_a_bound_too(pools) -> None:
    pool = pools(10, max_slots=2)
    for seed in range(6):
        pool.load_now(digest(seed), 10)
        assert pool.stats().resident <= 2


def test_many_asking_for_one_cold_adapter_load_it_once(pools) -> None:
    reads: list[str] = []
    gate = threading.Event()

    def slow(name: str) -> AdapterSet:
        reads.append(name)
        gate.wait(10)
        return adapter(seed_of(name))

    pool = pools(3, slow)
    waiters = [threading.Thread(target=pool.load_now, args=(digest(1), 10)) for _ in range(8)]
    for waiter in waiters:
        waiter.start()
    for _ in range(20):
        pool.want(digest(1))
    gate.set()
    for waiter in waiters:
        waiter.join()
    assert reads == [digest(1)]


def test_a_failed_load_is_told_to_those_who_wait_and_tried_again_later(pools, monkeypatch) -> None:
    broken = True

    def read(name: str) -> AdapterSet:
        if broken:
            raise Damaged("the file is damaged")
        return adapter(seed_of(name))

    pool = pools(3, read)
    with pytest.raises(Damaged):
        pool.load_now(digest(1), 10)
    with pytest.raises(Damaged) as told:
        pool.hold(digest(1))
    told.value.details["adapter"] = "acme/secret"  # as admission does for its own request
    with pytest.raises(Damaged) as other:
        pool.want(digest(1))
    assert (other.value.message, other.value.details) == ("the file is damaged", {})
    broken = False
    later = time.monotonic() + FAILURE_S
    monkeypatch.setattr("adapters.load_failures.time.monotonic", lambda: later)
    assert pool.load_now(digest(1), 10)


def test_an_adapter_larger_than_half_of_the_pool_is_refused(pools) -> None:
    with pytest.raises(Invalid):
        pools(3).check_size(adapter(1, ranks=16))


def test_ten_thousand_load_and_evict_cycles_keep_memory_flat(pools) -> None:
    sets = [adapter(seed) for seed in range(12)]
    pool = pools(4, lambda name: sets[seed_of(name) % 12], debug=False)

    def cycle(start: int, count: int) -> None:
        for seed in range(start, start + count):
            assert pool.load_now(digest(seed), 10)

    cycle(0, 1000)
    before = resident_kib()
    cycle(1000, 10_000)
    assert resident_kib() - before < 4096  # KiB: one adapter leaked a cycle would be 200 MiB
    stats = pool.stats()
    assert (stats.loads, stats.resident, stats.evictions) == (11_000, 4, 10_996)
    assert stats.used_bytes == stats.capacity_bytes


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_bytes_are_within_a_tenth_of_the_tensors_in_the_serving_dtype(dtype) -> None:
    """At the standard shapes: n_embd 384, 6 layers, rank 8, LayerNorms and critic carried."""
    config = GPTConfig(n_embd=384, n_layer=6, n_head=6, vocab_size=100)
    one = adapter(0, config, ranks=8, norms=True, critic=True)
    numbers = sum(tensor.numel() for tensor in one.tensors.values())
    assert placed_bytes(one, dtype) <= 1.1 * numbers * dtype.itemsize


def test_the_host_tier_brings_evicted_adapters_back_without_the_disk(pools) -> None:
    """The staging way of a GPU, on the CPU: image in host memory, one copy, views made of it."""
    reads: list[str] = []

    def read(name: str) -> AdapterSet:
        reads.append(name)
        return adapter(seed_of(name), norms=True, critic=True, classes=3)

    size = placed_bytes(read(digest(0)), torch.float32)
    reads.clear()
    tier = HostTier(TINY, torch.float32, capacity_bytes=3 * size, pin=False)
    pool = pools(2, read, capacity_bytes=size, host_tier=tier)
    for seed in (1, 2, 1, 2, 3, 1):
        assert pool.load_now(digest(seed), 60)  # PyTorch's first meta tensor imports much
        slot = pool.hold(digest(seed))
        assert slot is not None
        expected = weights_of(
            adapter(seed, norms=True, critic=True, classes=3),
            TINY,
            torch.float32,
            lambda tensor, dtype: tensor.to(dtype),
        )
        assert_same_weights(slot.weights, expected)
        pool.let_go([slot])
    assert reads == [digest(1), digest(2), digest(3)]
    pool.load_now(digest(4), 10)
    assert tier.bytes <= tier.capacity_bytes


def test_a_lease_is_released_exactly_once() -> None:
    book = LeaseBook()
    lease = book.take("a", 1, digest(1))
    lease.release()
    with pytest.raises(AssertionError, match="twice"):
        lease.release()
    assert book.total == book.of_name("a") == book.of_digest(digest(1)) == 0


def test_a_drain_waits_for_the_leases_of_its_time_and_no_later_ones() -> None:
    book = LeaseBook()
    drained: list[int] = []
    early = [book.take("a", 1, digest(1)) for _ in range(3)]
    other = book.take("b", 1, digest(2))
    assert book.when_drained(digest(1), lambda: drained.append(1)) == 3
    late = book.take("a", 1, digest(1))
    for lease in early[:2]:
        lease.release()
    assert drained == []
    early[2].release()
    assert drained == [1]
    late.release()
    other.release()
    assert book.when_drained(digest(1), lambda: drained.append(2)) == 0
    assert drained == [1, 2]
