"""Folders: their names on the disk, and their locks. Without torch, as backups use it."""

import fcntl
import os
from pathlib import Path

from adapters.errors import InUse


def sync_folder(folder: Path) -> None:
    """Have the folder's names on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, kind: int, folder: Path) -> None:
    """Lock at once (fcntl.LOCK_EX or LOCK_SH). Raises InUse, and has closed the descriptor then."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InUse(f"another server uses {folder}; give this one a --data folder") from error
