"""Reserve: disk space kept back, so that deleting works on a full disk.

SQLite can't record a delete without room: the tombstones go into its write-ahead log first, and
the files are unlinked afterwards. Measured, a delete of 1,000 versions writes 0.3 MB into the log
of a small registry and 2.0 MB where 20,000 other versions scatter them over the pages of the index;
one page a version, some 4 MB, is the most. While the files are freed the log grows to the 1,000
pages (4.2 MB) at which SQLite empties it. RESERVE_BYTES is twice that.
"""

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from adapters.errors import StorageFull

log = logging.getLogger("trunkline.disk")

RESERVE_BYTES = 8 << 20
LARGEST_SHARE = 8  # a small disk gives an eighth at most
_STEP = 64 << 10  # bytes; less than one is not worth a file
_BLOCK = 512  # st_blocks' unit, whatever the file system's own is

T = TypeVar("T")


class Reserve:
    """A file of at most `size` bytes; 0 keeps none. All methods are thread-safe.

    While it is given up uploads are refused, or they would take the space that deletes need.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self.size = min(size, _disk_bytes(path.parent) // LARGEST_SHARE)
        self._lock = threading.Lock()
        self._was_spent = False
        self.whole = self._held_bytes() >= self.size

    def spend(self, write: Callable[[], T]) -> T:
        """Run a write that frees space; where the disk is full, once more without the reserve.

        Raises what `write` raises, StorageFull where even the reserve was not enough.
        """
        try:
            return write()
        except StorageFull:
            if not self._give_up():
                raise
            return write()

    def take_back(self) -> bool:
        """Make the file again where it was given up, as large as half of the room allows.

        Returns whether it is whole; a part of it is good for a few deletes already.
        """
        with self._lock:
            if not self.whole:
                held = self._held_bytes()
                wanted = min(self.size, (held + self._free_bytes()) // 2 // _STEP * _STEP)
                if wanted > held:
                    self._allocate(wanted)
                self.whole = self._held_bytes() >= self.size
                if self.whole:
                    level = logging.INFO if self._was_spent else logging.DEBUG
                    log.log(level, "%d bytes are kept in reserve for deletes", self.size)
            return self.whole

    def _give_up(self) -> bool:
        """False where there was nothing to give up."""
        with self._lock:
            had_some = self.size > 0 and self._path.exists()
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            if self.size:
                self.whole = False
        if had_some:
            self._was_spent = True
            log.warning("the disk is full: the reserve of %d bytes is given up", self.size)
        return had_some

    def _held_bytes(self) -> int:
        try:
            return self._path.stat().st_blocks * _BLOCK
        except OSError:
            return 0

    def _free_bytes(self) -> int:
        with suppress(OSError):
            status = os.statvfs(self._path.parent)
            return status.f_bavail * status.f_frsize
        return 0

    def _allocate(self, size: int) -> None:
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)


def _disk_bytes(folder: Path) -> int:
    with suppress(OSError):
        status = os.statvfs(folder)
        return status.f_blocks * status.f_frsize
    return 0
