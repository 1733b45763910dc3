"""Pins and residency belong to a version of a name; pins are counted when they are asked for."""

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_library_states import adapter_file, backbone, encoder, put
from test_slots import adapter

from adapters.errors import PoolFull
from adapters.library import Library
from adapters.residency import Place
from adapters.slots import SlotPool
from adapters.weights import placed_bytes

Open = Callable[..., Library]
NOWHERE = Place(resident=False, pinned=False, pin_held=False, in_flight=0)
HELD = Place(resident=True, pinned=True, pin_held=True, in_flight=0)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the same folder with a pool of so many slots, and closes what was open."""
    libraries: list[Library] = []

    def open_(slots: int, by_bytes: bool = False) -> Library:
        size = placed_bytes(adapter(0), torch.float32)

        def pool(read) -> SlotPool:
            capacity, most = size * slots * (1 if by_bytes else 4), 0 if by_bytes else slots
            return SlotPool(
                TINY,
                torch.float32,
                torch.device("cpu"),
                capacity_bytes=capacity,
                max_slots=most,
                read=read,
            )

        close()
        libraries.append(Library(tmp_path, backbone(), encoder(), pool))
        return libraries[0]

    def close() -> None:
        while libraries:
            libraries.pop().close()

    yield open_
    close()


def names(library: Library, count: int) -> list[str]:
    """So many names, each with bytes of its own."""
    for seed in range(count):
        put(library, f"n{seed}", adapter_file(seed))
    return [f"n{seed}" for seed in range(count)]


def place(library: Library, name: str) -> Place:
    return library.residency.place(library.version(name))


def pins_of(library: Library, references: list[str], key: str = "") -> list[str]:
    """Those of the references that could be pinned."""

    def pin(reference: str) -> bool:
        try:
            library.pin(reference, "test", key)
        except PoolFull:
            return False
        return True

    return [reference for reference in references if pin(reference)]


@pytest.mark.parametrize("by_bytes", [False, True])
def test_eight_pins_at_once_leave_half_of_the_slots(opened: Open, by_bytes: bool) -> None:
    """None of them is resident when it is asked for, and a restart holds the same ones."""
    library = opened(8, by_bytes)
    every = names(library, 9)
    with ThreadPoolExecutor(8) as threads:
        pinned = list(chain(*threads.map(lambda name: pins_of(library, [name]), every[:8])))
    assert len(pinned) == 4
    for name in every:
        assert library.load(name, 10)[1]  # there is room for others
    library = opened(8, by_bytes)
    assert [name for name in every if place(library, name).pin_held] == sorted(pinned)
    assert pins_of(library, every) == sorted(pinned)


def test_one_key_pins_half_of_what_all_can_pin(opened: Open) -> None:
    library = opened(8)
    every = names(library, 9)
    assert pins_of(library, every, "one") == every[:2]
    assert pins_of(library, every[2:], "two") == every[2:4]
    assert pins_of(library, every[4:], "three") == []
    library.unpin(every[0], "test")
    assert pins_of(library, every[4:], "two") == []  # it has its part
    assert pins_of(library, every[4:], "three") == [every[4]]


def test_a_pin_beyond_a_smaller_pool_is_kept_and_reported_and_blocks_nothing(opened: Open) -> None:
    library = opened(8)
    every = names(library, 6)
    assert pins_of(library, every[:4]) == every[:4]
    library = opened(2)
    assert [place(library, name).pinned for name in every] == [True] * 4 + [False] * 2
    assert [place(library, name).pin_held for name in every] == [True] + [False] * 5
    for name in every:
        assert library.load(name, 10)[1]
    library.unpin(every[0], "test")
    assert place(library, every[1]).pin_held  # there is room for it now
    library = opened(8)
    assert [place(library, name).pin_held for name in every] == [False] + [True] * 3 + [False] * 2


def test_one_name_s_unload_unpin_and_delete_leave_another_s_pin_and_slot(opened: Open) -> None:
    library = opened(8)
    digest = put(library, "mine", adapter_file(0)).digest
    put(library, "theirs", adapter_file(0))
    library.pin("mine", "test")
    assert library.load("mine", 10)[1]
    assert place(library, "mine") == HELD
    for act in (library.unload, library.unpin):
        assert place(library, "theirs") == NOWHERE  # the same bytes, under another name
        act("theirs", "test")
        assert place(library, "mine") == HELD
    assert library.load("theirs", 10)[1]
    assert library.remove("theirs", None, "test") == 0
    assert place(library, "mine") == HELD
    assert library.store.path(digest).is_file()
    library.unload("mine", "test")
    assert place(library, "mine") == NOWHERE
    assert not library.slots.is_resident(digest)


def test_a_slot_stays_until_the_last_name_that_uses_it_is_unloaded(opened: Open) -> None:
    library = opened(8)
    digest = put(library, "mine", adapter_file(0)).digest
    put(library, "theirs", adapter_file(0))
    for name in ("mine", "theirs"):
        assert library.load(name, 10)[1]
    library.unload("mine", "test")
    assert (place(library, "mine").resident, place(library, "theirs").resident) == (False, True)
    library.unload("theirs", "test")
    assert not library.slots.is_resident(digest)


def test_requests_of_one_name_are_not_counted_nor_waited_for_by_another(opened: Open) -> None:
    library = opened(8)
    digest = put(library, "mine", adapter_file(0)).digest
    put(library, "theirs", adapter_file(0))
    leases = [library.lease("theirs")[1] for _ in range(3)]
    assert library.load("mine", 10)[1]
    assert (place(library, "mine").in_flight, place(library, "theirs").in_flight) == (0, 3)
    assert library.unload("mine", "test")[1] == 0
    assert not place(library, "mine").resident
    assert library.remove("mine", None, "test") == 0
    assert library.remove("theirs", None, "test") == 3
    assert library.store.path(digest).is_file()  # its requests may still have to load it
    for lease in leases:
        lease.release()
    library._housekeeper.submit(lambda: None).result()
    assert not library.store.path(digest).exists()
    assert not library.slots.is_resident(digest)


def test_a_slot_loaded_again_for_a_waiting_request_is_resident_for_its_name(opened: Open) -> None:
    """The device thread asks by digest; whoever has a lease then is a user."""
    library = opened(8)
    version = put(library, "mine", adapter_file(0))
    put(library, "theirs", adapter_file(0))
    _, lease = library.lease("mine")
    library.slots.load_now(version.digest, 10)
    library.slots.evict(version.digest)  # for room, before the batch
    assert library.slots.load_now(version.digest, 10)
    assert (place(library, "mine").resident, place(library, "theirs").resident) == (True, False)
    lease.release()


def test_a_pin_goes_with_its_version(opened: Open, tmp_path: Path) -> None:
    library = opened(2)
    put(library, "a", adapter_file(0))
    library.pin("a", "test")
    put(library, "a", adapter_file(1))
    library.remove("a", 1, "test")
    rows = sqlite3.connect(tmp_path / "registry.sqlite").execute("SELECT * FROM pins").fetchall()
    assert rows == []
    assert pins_of(library, ["a"]) == ["a"]  # it is counted no more


def test_a_folder_that_pinned_by_digest_keeps_its_pins_under_the_name_that_asked(
    opened: Open, tmp_path: Path
) -> None:
    library = opened(8)
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2)):
        put(library, name, adapter_file(seed))
    library.pin("b", "test")
    digests = (library.version("b").digest, library.version("c").digest)
    opened(8)
    with sqlite3.connect(tmp_path / "registry.sqlite") as old:
        old.execute("DROP TRIGGER pin_of_a_removed_version")
        old.execute("DROP TABLE pins")
        old.execute("UPDATE blobs SET pinned = 1 WHERE digest IN (?, ?)", digests)
    old.close()
    library = opened(8)
    assert [name for name in "abcd" if place(library, name).pin_held] == ["b", "c"]
    library.unpin("b", "test")
    library = opened(8)
    assert [name for name in "abcd" if place(library, name).pin_held] == ["c"]
