"""`trunkline recover` keeps every row that can be read, of every table."""

import sqlite3
from contextlib import closing
from pathlib import Path

from test_start_matrix import open_library, put

from adapters.pin_table import PinTable
from adapters.recovery import COLUMNS, accept_loss, examine

DERIVED = {"commits", "blobs"}  # counted anew; read, but their files are checked again


def test_pins_and_the_past_outlive_a_registry_that_has_to_be_begun_again(tmp_path: Path) -> None:
    library = open_library(tmp_path)
    for name in ("pinned", "gone"):
        put(library, name, len(name))
    library.pin("pinned", "test", "key")
    library.remove("gone", None, "test")
    with library.registry.writing() as connection:
        connection.execute("UPDATE floors SET number = 7, generation = 9 WHERE bucket = 3")
        connection.execute("INSERT INTO folder_files VALUES ('seed', 'sha256:0')")
    library.close()
    before = rows(tmp_path)
    spoil_an_index(tmp_path / "registry.sqlite")
    assert not examine(tmp_path).is_fit_to_serve
    accept_loss(tmp_path)
    assert rows(tmp_path) == before
    library = open_library(tmp_path)
    assert [(pin.name, pin.key) for pin in PinTable(library.registry).rows()] == [("pinned", "key")]
    library.close()


def test_every_table_of_the_registry_is_read(tmp_path: Path) -> None:
    open_library(tmp_path).close()
    assert set(rows(tmp_path)) <= set(COLUMNS) | DERIVED


def rows(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(folder / "registry.sqlite")) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = {name for (name,) in names} - DERIVED
        return {each: sorted(database.execute(f"SELECT * FROM {each}")) for each in tables}


def spoil_an_index(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'versions_by_digest'"
        (page,) = database.execute(query).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    content[(page - 1) * size : page * size] = bytes(size)
    path.write_bytes(content)
