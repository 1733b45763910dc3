"""What a reference means is remembered until the next commit, and never beyond it."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.errors import Damaged, NotFound, TrunklineError
from adapters.names import CURRENT
from adapters.registry import Registry
from adapters.store import Blob
from adapters.validate import Manifest
from adapters.versions import Record


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "registry.sqlite")
    for number in (1, 2):
        put(registry, number)
    yield registry
    registry.close()


def blob(number: int) -> Blob:
    return Blob(f"sha256:{number:064}", 1, 0)


def put(registry: Registry, number: int) -> None:
    with registry.writing() as connection:
        registry.add(connection, "a", blob(number), Record(Manifest(), {}, 0.1), "test")


WRITES: dict[str, Callable[[Registry], object]] = {
    "put": lambda registry: put(registry, 3),
    "point": lambda registry: registry.point("a", CURRENT, 1, "test"),
    "remove": lambda registry: registry.remove("a", None, "test"),
    "set_damaged": lambda registry: registry.set_damaged([blob(2).digest]),
}


def meaning(find: Callable[[str], object]) -> object:
    try:
        return find("a")
    except TrunklineError as error:
        return type(error)


def test_a_reference_is_read_once_between_two_commits(registry: Registry, monkeypatch) -> None:
    first = registry.resolve("a")
    monkeypatch.setattr(registry._resolved, "_read", lambda _: pytest.fail("it was read again"))
    assert registry.resolve("a") == first


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_after_a_write_a_reference_means_what_the_file_says(
    registry: Registry, write: Callable[[Registry], object]
) -> None:
    before = registry.resolve("a")
    write(registry)
    assert meaning(registry.resolve) == meaning(registry.read)
    assert meaning(registry.resolve) != before


@pytest.mark.parametrize("most", [1000, 0], ids=["room", "full"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_was_read_before_a_commit_is_not_remembered_after_it(
    registry: Registry, write: Callable[[Registry], object], most: int, monkeypatch
) -> None:
    monkeypatch.setattr("adapters.resolved.MOST", most)
    read = registry.read

    def read_then_write(reference: str) -> object:
        monkeypatch.setattr(registry._resolved, "_read", read)
        version = read(reference)
        write(registry)
        return version

    monkeypatch.setattr(registry._resolved, "_read", read_then_write)
    assert registry.resolve("a").number == 2  # it was, when it was asked
    assert meaning(registry.resolve) == meaning(read)


def test_an_open_transaction_means_nothing_yet_and_a_failed_one_never(registry: Registry) -> None:
    seen: list[int] = []

    def look() -> None:
        seen.append(registry.resolve("a").number)

    def put_and_fail() -> None:
        with registry.writing() as connection:
            registry.add(connection, "a", blob(3), Record(Manifest(), {}, 0.1), "test")
            assert registry.read("a").number == 3  # to the transaction itself
            reader = threading.Thread(target=look)
            reader.start()
            reader.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        put_and_fail()
    look()
    assert seen == [2, 2]


def test_no_more_than_so_many_references_are_remembered(registry: Registry, monkeypatch) -> None:
    monkeypatch.setattr("adapters.resolved.MOST", 3)
    for reference in ("a", "a@1", "a@2", f"a@{blob(1).digest}", "a"):
        registry.resolve(reference)
        assert len(registry._resolved) <= 3


def test_what_means_nothing_is_asked_for_again(registry: Registry) -> None:
    registry.remove("a", None, "test")
    assert meaning(registry.resolve) is NotFound
    put(registry, 4)
    assert registry.resolve("a").number == 3
    registry.set_damaged([blob(4).digest])
    assert meaning(registry.resolve) is Damaged
