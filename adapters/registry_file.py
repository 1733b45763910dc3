"""The registry's file before it is opened: whether it is there, whole, and not older than its mark.

Opening a broken database for writing may remove what could still be read of it, so this reads only.
"""

import errno
import os
import sqlite3
import stat
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import RegistryLost
from adapters.inventory import Unnamed, unnamed_files
from adapters.mark import mark_of, read_mark
from adapters.storage_errors import PASSING, demand_readable, read_error
from adapters.store import BlobStore
from adapters.versions import parse_record

MAGIC = b"SQLite format 3\0"
TABLES = {"blobs", "versions", "pointers", "audit"}


@dataclass
class RegistryState:
    """What was found of a registry's file."""

    exists: bool = False  # with more than no bytes, or with a log of changes beside it
    fault: str | None = None  # why it can't be used
    commits: int = 0
    mark_fault: str | None = None  # why its mark can't be read
    mark: int | None = None  # the last acknowledged commit; None: an older data folder, or lost
    digests: set[str] | None = None  # of its files; None: not read

    @property
    def missing_commits(self) -> int:
        return max(0, (self.mark or 0) - self.commits)


def inspect_registry(path: Path) -> RegistryState:
    """What can be known without a change of any file.

    Raises nothing for what it finds; Unreadable where the system refuses a read for now, and
    StorageFull where the disk has no room to look.
    """
    state = RegistryState()
    try:
        state.mark = read_mark(mark_of(path))
    except OSError as error:
        _demand_lasting(error)
        state.mark_fault = f"can't be read: {error.strerror}"
    try:
        state.exists = _has_bytes(path)
        log_exists = _has_bytes(path.with_name(f"{path.name}-wal"))
        _has_bytes(path.with_name(f"{path.name}-shm"))
        if not state.exists and log_exists:
            state.fault = "is missing or empty, with a log of changes beside it"
        elif state.exists:
            state.fault = _fault_of(path, state)
    except OSError as error:
        _demand_lasting(error)
        state.exists = True
        name = Path(error.filename or path).name
        state.fault = f"can't be read: {name}: {error.strerror}"
    return state


def _demand_lasting(error: OSError) -> None:
    """Raises Unreadable for an error that may pass by itself."""
    if error.errno in PASSING:
        raise read_error(error, "the registry") from error


def _has_bytes(path: Path) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return status.st_size > 0


def _fault_of(path: Path, state: RegistryState) -> str | None:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return "is not an SQLite database"
    try:
        with closing(read_only(path)) as connection:
            return _broken(connection, state)
    except sqlite3.DatabaseError as error:
        demand_readable(error, path.parent)
        if is_refusal_of_the_disk(error):
            return None if _takes_no_writes(path) else f"can't be opened: {error}"
        return f"is broken: {error}"


def read_only(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing, the log of changes neither."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)


def is_refusal_of_the_disk(error: sqlite3.DatabaseError) -> bool:
    """Whether the file can't be opened here, which says nothing about its content."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)


def _takes_no_writes(path: Path) -> bool:
    return not os.access(path.parent, os.W_OK)


def _broken(connection: sqlite3.Connection, state: RegistryState) -> str | None:
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    tables = {name for (name,) in rows}
    if not tables:
        state.exists = False
        return None
    if not tables >= TABLES:
        return "is a database of something else"
    found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        return f"is broken: {found.splitlines()[-1]}"
    state.digests = {digest for (digest,) in connection.execute("SELECT digest FROM blobs")}
    if "commits" in tables:
        row = connection.execute("SELECT number FROM commits").fetchone()
        state.commits = row[0] if row else 0
    return _unreadable_rows(connection)


def _unreadable_rows(connection: sqlite3.Connection) -> str | None:
    lost = connection.execute(
        """SELECT count(*) FROM versions v LEFT JOIN blobs b ON b.digest = v.digest
        WHERE v.deleted_at IS NULL AND b.digest IS NULL"""
    ).fetchone()[0]
    if lost:
        return f"is broken: {lost} versions have lost the row of their file"
    # Parsing 10,000 records takes a second; this takes 20 ms and finds what is no longer JSON.
    unreadable = connection.execute(
        "SELECT count(*) FROM blobs WHERE NOT json_valid(record) OR json_array_length(record) != 3"
    ).fetchone()[0]
    return f"is broken: {unreadable} of its records can't be read" if unreadable else None


def is_record(text: object) -> bool:
    try:
        parse_record(str(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return True


def demand_registry(path: Path, store: BlobStore, shown: Path | None = None) -> None:
    """Raises RegistryLost unless the file can be served from, or begun in an empty folder.

    The sentence names `shown` where the file is a copy of that.
    """
    state = inspect_registry(path)
    fault = state.fault
    if fault is None and not state.exists:
        fault = _traces_beside(path, state, unnamed_files(store, ()))
    if fault is None and state.missing_commits:
        fault = (
            f"is older than what was acknowledged: it has {state.commits} commits, "
            f"{mark_of(path).name} has {state.mark}"
        )
    if fault is None and state.mark_fault:
        fault = f"can't be held against its mark: {mark_of(path).name} {state.mark_fault}"
    if fault is not None:
        raise registry_lost(shown or path, fault)
    if state.digests is not None:
        demand_no_unknown(shown or path, unnamed_files(store, state.digests))


def _traces_beside(path: Path, state: RegistryState, files: Unnamed) -> str | None:
    """Why a registry that is missing or empty must have been there."""
    if files.unknown:
        return f"is missing or empty, but there are {len(files.unknown)} adapter files beside it"
    if state.mark:
        return f"is missing or empty, but {mark_of(path).name} has {state.mark} commits"
    return None


def demand_no_unknown(path: Path, files: Unnamed) -> None:
    """Raises RegistryLost for files that a whole registry would know."""
    if files.unknown:
        count = len(files.unknown)
        which = f"{count} adapter files" if count > 1 else "an adapter file"
        raise registry_lost(path, f"has no row for {which} beside it, as {files.unknown[0]}")


def registry_lost(path: Path, fault: str) -> RegistryLost:
    """The sentence for it, with both ways out: each a command that can be given as it stands."""
    return RegistryLost(
        f"the registry {path} {fault}; nothing was changed: `trunkline restore BACKUP "
        f"{path.parent.parent} --replace` puts the registry, the files and the keys of a backup in "
        f"its place, and `trunkline recover {path.parent}` shows what is left and can go on "
        "without one"
    )
