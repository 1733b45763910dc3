"""Mark: the number of the registry's last acknowledged commit, in a file beside the registry.

A registry that was lost, cut, or replaced by an older copy has a lower number than its mark.
"""

import errno
import logging
import os
import stat
import threading
import zlib
from pathlib import Path

from adapters.folders import sync_folder

log = logging.getLogger("trunkline.mark")

SLOT = 512  # bytes: what a disk writes whole or not at all
SLOTS = 2  # written in turn, so that the number before survives a torn write


def mark_of(registry: Path) -> Path:
    """The path of the mark of a registry's file."""
    return registry.with_suffix(".mark")


def read_mark(path: Path) -> int | None:
    """The highest number in the file; None if there is no file or no number in it is whole.

    Raises OSError where the file is there and can't be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a pipe would be waited for for ever
            raise OSError(errno.EINVAL, "it is not a plain file", str(path))
        data = file.read(SLOT * SLOTS)
    numbers = (_number(data[at * SLOT : (at + 1) * SLOT]) for at in range(SLOTS))
    return max((number for number in numbers if number is not None), default=None)


def _number(slot: bytes) -> int | None:
    digits, checksum = slot[:20], slot[21:29]
    if not digits.isdigit() or checksum != _checksum(digits):
        return None
    return int(digits)


def _checksum(digits: bytes) -> bytes:
    return b"%08x" % zlib.crc32(digits)


class Mark:
    """Written after each commit and before it is acknowledged; the number never goes down.

    Where the mark can't be written the commit is still on disk and the mark is only behind, which
    a start accepts: so that is logged and not raised.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self.number = -1
        self._lock = threading.Lock()
        self._file = -1
        try:
            self.number = number if (known := read_mark(path)) is None else known
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if os.fstat(self._file).st_size < SLOT * SLOTS or known is None:
                self._begin()
        except OSError as error:
            log.warning("%s can't be written: %s", path, error.strerror)
        self.note(number)

    def _begin(self) -> None:
        """Both slots hold the number: a later write needs no room on the disk."""
        slot = b"%020d %s" % (self.number, _checksum(b"%020d" % self.number))
        os.pwrite(self._file, slot.ljust(SLOT - 1) + b"\n" + slot.ljust(SLOT - 1) + b"\n", 0)
        os.fsync(self._file)
        sync_folder(self.path.parent)

    def note(self, number: int) -> None:
        """Have the number on the disk when this returns."""
        with self._lock:
            if number <= self.number or self._file < 0:
                return
            digits = b"%020d" % number
            slot = (digits + b" " + _checksum(digits)).ljust(SLOT - 1) + b"\n"
            try:
                os.pwrite(self._file, slot, number % SLOTS * SLOT)
                os.fdatasync(self._file)
                self.number = number
            except OSError as error:
                log.warning("%s can't be written: %s", self.path, error.strerror)

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1
