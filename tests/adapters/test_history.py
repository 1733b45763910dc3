"""What the registry keeps of the past is bounded, and no number is ever given twice."""

import hashlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import history
from adapters.errors import ReadOnly
from adapters.history import bucket_of
from adapters.listing import matching
from adapters.pin_table import PinTable
from adapters.records import ParsedTexts
from adapters.recovery import accept_loss, examine
from adapters.registry import Registry
from adapters.store import Blob
from adapters.usage import UsageBook
from adapters.validate import Manifest
from adapters.versions import Record

RECORD = Record(Manifest(), {}, 0.0)
TABLES = ("versions", "pointers", "audit", "deleted_names", "floors", "namespace_floors")
NUMBERS = itertools.count()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    for name, value in (("DELETED_NAMES", 4), ("TOMBSTONES_OF_NAME", 3), ("AUDIT_OF_NAME", 5)):
        monkeypatch.setattr(history, name, value)
    for name, value in (("BUCKETS", 2), ("BUCKETS_OF_NAMESPACE", 2), ("NAMESPACE_ROWS", 3)):
        monkeypatch.setattr(history, name, value)
    registry = Registry(tmp_path / "registry.sqlite")
    yield registry
    registry.close()


def put(registry: Registry, name: str) -> int:
    digest = f"sha256:{hashlib.sha256(str(next(NUMBERS)).encode()).hexdigest()}"
    with registry.writing() as connection:
        return registry.add(connection, name, Blob(digest, 1, 1), RECORD, "tests")[0]


def rows(registry: Registry) -> dict[str, int]:
    return {
        table: registry._database.rows(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES
    }


def test_a_name_that_comes_back_gets_no_number_and_no_generation_it_ever_had(
    registry: Registry,
) -> None:
    for _ in range(7):
        put(registry, "first")
    registry.point("first", "stable", 3, "tests")
    registry.point("first", "stable", 4, "tests")
    generations = [p.generation for p in registry.named("first").pointers]
    registry.remove("first", None, "tests")
    for index in range(20):  # so many that its rows are dropped
        put(registry, f"other-{index}")
        registry.remove(f"other-{index}", None, "tests")
    assert not registry._database.rows("SELECT 1 FROM versions WHERE name = 'first'")
    assert put(registry, "first") > 7
    pointer = registry.point("first", "stable", registry.named("first").versions[0].number, "x")
    assert pointer.generation > max(generations)


def test_a_namespace_learns_nothing_of_another_by_the_numbers_of_its_new_names(
    registry: Registry,
) -> None:
    for index in range(12):  # so many that rows are dropped
        for _ in range(3):
            put(registry, f"acme/{index}")
        registry.remove(f"acme/{index}", None, "tests")
    assert rows(registry)["namespace_floors"] == 2
    assert [put(registry, f"beta/{index}") for index in range(12)] == [1] * 12
    assert min(put(registry, f"acme/{index}") for index in range(12)) > 3


def test_numbers_are_never_given_twice_in_more_namespaces_than_have_rows(
    registry: Registry,
) -> None:
    names, given = [f"space-{index}/a" for index in range(20)], {}
    for name in names:
        given[name] = put(registry, name)
        registry.remove(name, None, "tests")
    assert rows(registry)["namespace_floors"] == history.NAMESPACE_ROWS
    assert all(put(registry, name) > given[name] for name in names)


def test_a_delete_takes_as_many_statements_for_many_versions_as_for_few(
    registry: Registry,
) -> None:
    """The transaction keeps other tenants' writes waiting."""
    counted = []
    for count in (10, 100):
        name = f"of-{count}"
        for _ in range(count):
            put(registry, name)
        registry.point(name, "stable", 1, "tests")
        registry.point(name, "stable", 2, "tests")
        statements: list[str] = []
        connection = registry._database._connection()
        connection.set_trace_callback(statements.append)
        assert len(registry.remove(name, None, "tests")) == count
        connection.set_trace_callback(None)
        counted.append(len(statements))
        assert not registry.exists(name)
        assert not registry._database.rows("SELECT 1 FROM pointers WHERE number OR previous")
        assert len(registry.audit(name)) == history.AUDIT_OF_NAME
    assert counted[0] == counted[1]


def test_the_past_of_names_that_come_and_go_takes_no_more_rows(registry: Registry) -> None:
    put(registry, "stays")
    counted = []
    for index in range(60):
        put(registry, f"name-{index}")
        put(registry, f"name-{index}")
        number = put(registry, "stays")
        registry.remove("stays", number - 1, "tests")
        registry.remove(f"name-{index}", None, "tests")
        counted.append(rows(registry))
    assert max(counted[30:], key=str) == min(counted[30:], key=str)
    assert registry.named("stays").current.number == 61
    assert len(registry.audit("stays")) == history.AUDIT_OF_NAME


def test_a_file_of_the_folder_that_was_deleted_stays_deleted_for_ever(registry: Registry) -> None:
    put(registry, "seed")
    digest = registry.named("seed").versions[0].digest
    registry.saw_file("seed", digest)
    registry.remove("seed", None, "tests")
    for index in range(20):
        put(registry, f"other-{index}")
        registry.remove(f"other-{index}", None, "tests")
    assert registry.knows("seed", digest)


def test_a_registry_of_before_is_taken_over_with_its_files_and_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "old.sqlite")
    for _ in range(3):
        put(registry, "gone")
    with registry.writing() as connection:
        connection.execute("UPDATE versions SET deleted_at = 1.0 WHERE name = 'gone'")
        detail = '{"version": 1, "digest": "sha256:seed"}'
        connection.execute(
            "INSERT INTO audit (at, who, action, name, detail) VALUES (0, 'file a', 'put', ?, ?)",
            ("gone", detail),
        )
        for table in ("floors", "deleted_names", "folder_files"):
            connection.execute(f"DROP TABLE {table}")
    registry.close()
    monkeypatch.setattr(history, "DELETED_NAMES", 0)

    def refused() -> None:
        raise ReadOnly("the data folder took no writes at the start")

    shutil.copyfile(tmp_path / "old.sqlite", tmp_path / "copy.sqlite")
    copy = Registry(tmp_path / "copy.sqlite", refused)  # as a start on a read-only disk opens it
    assert copy.knows("gone", "sha256:seed")
    copy.close()
    registry = Registry(tmp_path / "old.sqlite")
    assert rows(registry)["versions"] == 0
    assert registry.knows("gone", "sha256:seed")
    assert put(registry, "gone") == 4
    registry.close()


def test_a_name_that_an_older_release_brought_back_is_not_dropped_with_the_deleted_ones(
    registry: Registry,
) -> None:
    put(registry, "back")
    registry.remove("back", None, "tests")
    put(registry, "back")
    with registry.writing() as connection:  # an older release has no such table
        connection.execute("INSERT INTO deleted_names (name) VALUES ('back')")
    for index in range(8):
        put(registry, f"other-{index}")
        registry.remove(f"other-{index}", None, "tests")
    assert registry.exists("back")


def test_a_copy_of_an_older_registry_is_completed_where_nothing_may_be_written(
    tmp_path: Path,
) -> None:
    def refuse() -> None:
        raise ReadOnly("no writes")

    registry = Registry(tmp_path / "old.sqlite", refuse)
    assert rows(registry)["floors"] == history.BUCKETS
    registry.close()


def test_recovery_keeps_pins_and_the_numbers_of_names_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    path = tmp_path / "registry.sqlite"
    registry = Registry(path)
    put(registry, "a")
    PinTable(registry).add(registry.read("a"), "key", "tests")
    with registry.writing() as connection:
        connection.execute("UPDATE floors SET number = 7 WHERE bucket = ?", (bucket_of("gone"),))
    registry._database.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    query = "SELECT rootpage FROM sqlite_master WHERE name = 'audit_by_name'"
    page = registry._database.rows(query)[0][0]
    registry.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 200)
    assert "is broken" in str(examine(tmp_path).state.fault)
    accept_loss(tmp_path)
    registry = Registry(path)
    assert [(row.name, row.number, row.key) for row in PinTable(registry).rows()] == [
        ("a", 1, "key")
    ]
    assert put(registry, "gone") == 8
    registry.close()


def test_parsed_records_are_bounded_by_bytes_and_usage_by_names() -> None:
    parsed = ParsedTexts(len, most_bytes=100)
    assert [parsed("x" * size) for size in (60, 30, 60, 50, 1000)] == [60, 30, 60, 50, 1000]
    assert len(parsed) == 1  # the last within the bound: what is beyond it drives no other out
    assert parsed("y" * 90) == parsed("y" * 90) == 90
    assert len(parsed) == 1
    book = UsageBook(most=2)
    for name in ("a", "b", "c", "c"):
        book.count(name)
    assert book.values(of_last_use=False) == {"b": 1, "c": 2}
    book.forget("c")
    assert book.of("c").requests == 0


def test_a_tenants_own_names_are_found_without_reading_others(registry: Registry) -> None:
    """Else the time of its lists would tell how many names there are."""
    for name in ("acme/a", "acme/b", "beta/a"):
        put(registry, name)
    for patterns in (("acme/*",), ("acme/*", "acme-2/*")):
        assert list(registry.creation_times(patterns)) == ["acme/a", "acme/b"]
        matches, values = matching(patterns)
        query = f"EXPLAIN QUERY PLAN SELECT s.name FROM versions s WHERE {matches}"
        plan = [row[3] for row in registry.rows(query, *values)]
        assert not any(step.startswith("SCAN") for step in plan), plan
