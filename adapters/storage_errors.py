"""Errors of the disk and of SQLite, sorted into four kinds in one table.

* StorageFull: the disk has no room. Deleting helps.
* ReadOnly: the disk, or the folder, takes no writes from this process.
* Unreadable and Unwritten: the call failed for a reason that says nothing about the stored bytes
  (no file descriptor, no memory, an I/O error, a signal). The same call may succeed a second later.

None of them says that a file is damaged: damage is a wrong digest or a missing file.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from adapters.errors import ReadOnly, StorageFull, TrunklineError, Unreadable, Unwritten

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_WRITES = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
PASSING = frozenset({errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})
# Everything else is transient too, as ESTALE, ETIMEDOUT, EBUSY ...

NOTHING_STORED = "nothing was stored"
FULL_SENTENCE = f"the disk is full; {NOTHING_STORED}"
RETRY_S, REPAIR_S = 1, 30  # Retry-After: of what passes by itself, of what a person repairs

_PRIMARY = 0xFF  # of SQLite's extended result codes, the primary one
_REFUSALS = frozenset(
    {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM}
)
_MISUSE = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_RANGE})


def read_error(error: OSError | MemoryError, what: str) -> Unreadable:
    """The error of a read that the system refused; the bytes that are stored may be sound."""
    return Unreadable(f"{what} can't be read now: {reason(error)}", retry_after_s=RETRY_S)


def opened(path: Path) -> IO[bytes]:
    """An upload's file, to be read again. Raises Unreadable."""
    try:
        return path.open("rb")
    except OSError as error:
        raise read_error(error, "the upload") from error


def write_error(error: OSError) -> TrunklineError:
    """StorageFull, ReadOnly or Unwritten, by the error's number."""
    if error.errno in FULL:
        return StorageFull(FULL_SENTENCE)
    if error.errno in NO_WRITES:
        return ReadOnly(
            f"the disk takes no writes ({reason(error)}); {NOTHING_STORED}",
            retry_after_s=REPAIR_S,
        )
    return Unwritten(
        f"the disk can't be written now ({reason(error)}); {NOTHING_STORED}",
        retry_after_s=RETRY_S,
    )


def reason(error: OSError | MemoryError) -> str:
    """The system's words for it, without the path that an OSError carries."""
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    return error.strerror or type(error).__name__


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raises a write's OSErrors as StorageFull, ReadOnly or Unwritten."""
    try:
        yield
    except OSError as error:
        raise write_error(error) from error


@contextmanager
def reading_registry() -> Iterator[None]:
    """Raises SQLite's refusals of a read as Unreadable. Faults of a statement stay as they are."""
    try:
        yield
    except (sqlite3.OperationalError, MemoryError) as error:
        if isinstance(error, sqlite3.OperationalError) and _is_ours(error):
            raise
        sentence = f"the registry can't be read now: {_words(error)}"
        raise Unreadable(sentence, retry_after_s=RETRY_S) from error


@contextmanager
def writing_registry(folder: Path) -> Iterator[None]:
    """Raises SQLite's refusals of a write to a file in `folder` as one of the kinds above.

    SQLite reports "disk I/O error" for a write that failed with EROFS as well as with EIO, so the
    folder is asked what is wrong with it.
    """
    try:
        yield
    except (sqlite3.OperationalError, MemoryError) as error:
        if isinstance(error, sqlite3.OperationalError) and _is_ours(error):
            raise
        raise _registry_write_error(error, folder) from error


def _registry_write_error(
    error: sqlite3.OperationalError | MemoryError, folder: Path
) -> TrunklineError:
    code = 0 if isinstance(error, MemoryError) else error.sqlite_errorcode & _PRIMARY
    if code == sqlite3.SQLITE_FULL:
        return StorageFull(FULL_SENTENCE)
    fault = None
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        fault = refusal_to_write(folder)
    if fault is not None:
        return write_error(fault)
    if code == sqlite3.SQLITE_READONLY:
        return ReadOnly(f"the registry takes no writes; {NOTHING_STORED}", retry_after_s=REPAIR_S)
    sentence = f"the registry can't be written now ({_words(error)}); the change was not made"
    return Unwritten(sentence, retry_after_s=RETRY_S)


def demand_readable(error: sqlite3.DatabaseError, folder: Path) -> None:
    """Returns where this error of a read says something about the database in `folder`.

    Raises StorageFull where the disk has no room to read it, since SQLite makes a file beside it,
    and Unreadable where the system refused the read for now. A short read is a file that was cut.
    """
    code = getattr(error, "sqlite_errorcode", 0)
    if code & _PRIMARY not in _REFUSALS or code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return
    refusal = refusal_to_write(folder)
    if refusal is not None and refusal.errno in FULL:
        raise StorageFull(FULL_SENTENCE) from error
    if code & _PRIMARY != sqlite3.SQLITE_CANTOPEN:
        sentence = f"the registry can't be read now: {_words(error)}"
        raise Unreadable(sentence, retry_after_s=RETRY_S) from error


def refusal_to_write(folder: Path) -> OSError | None:
    """What keeps a small file from being written in a folder, or None."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, bytes(4096))
        finally:
            os.close(descriptor)
            os.unlink(probe)
    except OSError as error:
        return error
    return None


def _is_ours(error: sqlite3.OperationalError) -> bool:
    """Whether the statement is wrong, and not the disk: a fault of this program."""
    return error.sqlite_errorcode & _PRIMARY in _MISUSE


def _words(error: sqlite3.DatabaseError | MemoryError) -> str:
    return str(error) or os.strerror(errno.ENOMEM)
