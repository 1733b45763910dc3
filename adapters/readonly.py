"""A start on a data folder that takes no writes: the lock, and a copy of the registry.

SQLite can't read a database in WAL mode without writing beside it, and its `immutable` mode leaves
out the write-ahead log, whose transactions were acknowledged. Database and log are therefore
copied to a temporary folder and opened there. Nobody writes them meanwhile: the lock sees to it.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from adapters.errors import ReadOnly
from adapters.folders import take_lock
from adapters.mark import mark_of
from adapters.storage_errors import NO_WRITES, reason, refusal_to_write

LOG_SUFFIX = "-wal"
MEMORY = Path("/dev/shm")  # where a container has no other place for temporary files


def refusal(folder: Path, registry: Path) -> OSError | None:
    """Why the folder, made where it is missing, or its registry takes no writes; None: it does.

    A full disk is no refusal: deletes work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error if error.errno in NO_WRITES else None
    fault = refusal_to_write(folder)
    if fault is not None and fault.errno in NO_WRITES:
        return fault
    if registry.exists() and not os.access(registry, os.W_OK, effective_ids=True):
        return OSError(errno.EACCES, os.strerror(errno.EACCES))
    return None


def lock(folder: Path, refused: OSError) -> int:
    """A descriptor whose shared lock keeps writers out. Raises InUse, or ReadOnly for no folder.

    Several servers may serve a folder that takes no writes.
    """
    nearest = next((p for p in (folder / "lock", folder, folder.parent) if p.exists()), None)
    try:
        descriptor = os.open(nearest or folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        why = reason(refused if nearest is None else error)
        raise ReadOnly(f"{folder} can't be made or read: {why}") from error
    take_lock(descriptor, fcntl.LOCK_SH, folder)
    return descriptor


def copy_registry(registry: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder with a copy of the database, its log and its mark, where they are there.

    Raises ReadOnly where there is no place for temporary files either, or it can't be read.
    """
    folder = _temporary_folder()
    try:
        for path in (registry, registry.with_name(registry.name + LOG_SUFFIX), mark_of(registry)):
            if path.exists():
                shutil.copyfile(path, Path(folder.name) / path.name)
    except OSError as error:
        folder.cleanup()
        raise ReadOnly(
            f"{registry} can't be copied to {folder.name}, which a start on a data folder without "
            f"writes needs: {reason(error)}; set TMPDIR to a folder with room"
        ) from error
    return folder


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="trunkline-registry-")
    except OSError as error:
        if os.access(MEMORY, os.W_OK):
            return tempfile.TemporaryDirectory(prefix="trunkline-registry-", dir=MEMORY)
        raise ReadOnly(
            "a start on a data folder without writes needs a folder for temporary files "
            f"({reason(error)}); set TMPDIR to one"
        ) from error
