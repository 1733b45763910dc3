"""Recovery without a backup: what a folder still has, and a registry begun from it.

Nothing is deleted: the broken registry stays under another name, unknown files go to quarantine.
"""

import logging
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from adapters import history, pin_table
from adapters.inventory import Unnamed, unnamed_files
from adapters.mark import mark_of
from adapters.opening import lock_folder
from adapters.registry import SCHEMA, Registry
from adapters.registry_file import RegistryState, inspect_registry, is_record, read_only
from adapters.store import BlobStore

log = logging.getLogger("trunkline.recovery")

SIDE_FILES = ("", "-wal", "-shm", "-journal")  # a database and what belongs to it
COLUMNS = {
    "blobs": ("digest", "bytes", "mtime_ns", "record", "pinned", "damaged"),
    "versions": ("name", "number", "digest", "created_at", "deleted_at"),
    "pointers": ("name", "alias", "number", "previous", "generation"),
    "audit": ("id", "at", "who", "action", "name", "detail"),
    "deleted_names": ("id", "name"),
    "floors": ("bucket", "number", "generation"),
    "namespace_floors": ("namespace", "bucket", "number", "generation"),
    "folder_files": ("name", "digest"),
    "pins": ("name", "number", "key", "at"),
    "commits": ("one", "number"),
}


Rows = dict[str, list[tuple[object, ...]]]  # by table

REQUIRED = ("blobs", "versions", "pointers", "audit")  # the other tables came later


@dataclass
class Findings:
    """What is wrong with one trunk's folder; `state.fault` and `files` say what."""

    folder: Path
    state: RegistryState
    files: Unnamed

    @property
    def is_fit_to_serve(self) -> bool:
        lost = not self.state.exists and (self.files.unknown or self.state.mark)
        state = self.state
        faults = state.fault or state.mark_fault or state.missing_commits or self.files.unknown
        return not (faults or lost)

    def sentences(self) -> Iterator[str]:
        path = self.folder / "registry.sqlite"
        if self.state.fault:
            yield f"{path} {self.state.fault}"
        elif not self.state.exists:
            yield f"{path} is missing or empty"
        else:
            yield f"{path} is whole and names {len(self.state.digests or ())} files"
        if self.state.mark_fault:
            yield f"{mark_of(path)} {self.state.mark_fault}"
        if self.state.missing_commits and not self.state.fault:
            yield f"{self.state.missing_commits} acknowledged changes are missing from it"
        if self.files.unknown and not self.state.fault:
            yield f"{len(self.files.unknown)} adapter files have no row in it"


def trunk_folders(folder: Path) -> list[Path]:
    """The folders of trunks in a data folder, or the folder itself if it is one."""
    candidates = [folder, *sorted(each for each in folder.iterdir() if each.is_dir())]
    return [each for each in candidates if (each / "blobs").is_dir()]


def examine(folder: Path) -> Findings:
    """What a start would find. Changes nothing. Raises StorageFull, ReadOnly or Unreadable."""
    state = inspect_registry(folder / "registry.sqlite")
    known = state.digests or set[str]()
    return Findings(folder, state, unnamed_files(BlobStore(folder / "blobs"), known))


def accept_loss(folder: Path) -> list[str]:
    """Have the folder served from what can be read of its registry; what was done, in sentences.

    Raises InUse while a server uses the folder.
    """
    lock = lock_folder(folder)
    try:
        return list(_recover(examine(folder)))
    finally:
        os.close(lock)


def _recover(found: Findings) -> Iterator[str]:
    path, store = found.folder / "registry.sqlite", BlobStore(found.folder / "blobs")
    now = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.lost-{now}-{uuid.uuid4().hex[:4]}")
    if found.state.fault:
        yield from _begin_again(path, aside)
    else:
        yield from _keep_a_copy(path, aside)
    yield from _rename(mark_of(path), mark_of(path).with_name(f"{aside.name}-mark"))
    registry = Registry(path)
    try:
        unnamed = unnamed_files(store, registry.blobs())
    finally:
        registry.close()
    for file in [*unnamed.unknown, *unnamed.unacknowledged]:
        if store.quarantine(file):
            yield f"{file} was put into {store.quarantine_folder}"
        else:
            yield f"{file} can't be moved: the disk takes no writes"


def _rename(path: Path, target: Path) -> Iterator[str]:
    with suppress(FileNotFoundError):
        os.rename(path, target)
        yield f"{path} was renamed to {target.name}"


def _keep_a_copy(path: Path, aside: Path) -> Iterator[str]:
    """Opening a registry overwrites what can't be read of its log of changes."""
    for end in SIDE_FILES:
        with suppress(FileNotFoundError):
            shutil.copyfile(f"{path}{end}", f"{aside}{end}")
            yield f"{path}{end} was copied to {aside.name}{end}"


def _begin_again(path: Path, aside: Path) -> Iterator[str]:
    """A new registry with the rows that can be read of the old one, which keeps another name.

    It is complete before the old one is renamed: a stop before that has changed nothing.
    """
    new = path.with_name(f"{aside.name}-new")
    rows = _sound(_salvage(path))
    _write(new, rows)
    for end in SIDE_FILES:
        yield from _rename(Path(f"{path}{end}"), Path(f"{aside}{end}"))
    os.rename(new, path)
    live = {(row[0], row[1]) for row in rows["versions"] if row[4] is None}
    yield f"{path} was begun with {len(live)} versions of {len({name for name, _ in live})} names"


def _sound(rows: Rows) -> Rows:
    """Without rows that mean nothing, since those that they belong to are lost."""
    blobs = [row for row in rows["blobs"] if is_record(row[3])]
    digests = {row[0] for row in blobs}
    versions = [row for row in rows["versions"] if row[2] in digests or row[4]]
    live = {(row[0], row[1]) for row in versions if row[4] is None}
    # A pointer to a version that is gone points to nothing: its generation stays.
    pointers = [
        (name, alias, *(n if (name, n) in live else None for n in (number, previous)), generation)
        for name, alias, number, previous, generation in rows["pointers"]
    ]
    sound = rows | {"blobs": blobs, "versions": versions, "pointers": pointers}
    if "pins" in rows:
        sound["pins"] = [row for row in rows["pins"] if row[:2] in live]
    return sound


def _write(path: Path, rows: Rows) -> None:
    """A registry without a log beside it, on the disk when this returns."""
    pins = pin_table.SCHEMA if "pins" in rows else ""  # else PinTable makes it, of old pins
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {history.SCHEMA} {pins}")
        for table, found in rows.items():
            marks = ", ".join("?" * len(COLUMNS[table]))
            connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", found)
        history.prepare(connection)
        connection.execute("COMMIT")


def _salvage(path: Path) -> Rows:
    """What can be read, by table. Of a copy: SQLite removes the log of a file that is empty."""
    with tempfile.TemporaryDirectory(prefix="trunkline-recover-") as folder:
        copy = Path(folder) / "registry.sqlite"
        for end in SIDE_FILES:
            with suppress(OSError):
                shutil.copyfile(f"{path}{end}", f"{copy}{end}")
        tables = [*REQUIRED, *(table for table in COLUMNS if _has_table(copy, table))]
        return {table: list(_readable_rows(copy, table)) for table in dict.fromkeys(tables)}


def _has_table(path: Path, table: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    with suppress(sqlite3.Error, OSError), closing(read_only(path)) as connection:
        return connection.execute(query, (table,)).fetchone() is not None
    return False


def _readable_rows(path: Path, table: str) -> Iterator[tuple[object, ...]]:
    """From both ends of the table, each until something can't be read; rows may come twice."""
    columns = ", ".join(COLUMNS[table])
    for order in ("ASC", "DESC"):
        with suppress(sqlite3.Error, OSError), closing(read_only(path)) as connection:
            connection.text_factory = bytes
            yield from map(
                _decoded,
                connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1 {order}, 2 {order}"),
            )


def _decoded(row: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in row)
