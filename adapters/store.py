"""BlobStore: adapter files under their digests. A file is there whole, or not at all."""

import errno
import hashlib
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import Damaged, Invalid, ReadOnly, StorageFull, TrunklineError
from adapters.folders import sync_folder
from adapters.format import AdapterSet, read_adapter
from adapters.soundness import fault_of
from adapters.storage_errors import read_error, reason, storage_errors

log = logging.getLogger("trunkline.store")

QUARANTINE = "quarantine"  # a folder within that of the published files
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}


@dataclass(frozen=True)
class Blob:
    """A stored file, and the time of its last change: a later change shows that it was touched."""

    digest: str  # sha256:<64 hex>
    bytes: int
    mtime_ns: int


class Incoming:
    """An upload on its way: written to a temporary file of its own while it is hashed."""

    def __init__(self, path: Path, admit: Callable[[], None]) -> None:
        self.path = path
        self.bytes = 0
        self._in_doubt = False  # it may have a name in the store that no commit has confirmed
        self._admit = admit
        admit()
        self._sha = hashlib.sha256()
        with storage_errors():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o644)

    def write(self, data: bytes) -> None:
        """Raises StorageFull, ReadOnly or Unwritten."""
        self._admit()
        with storage_errors():
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
        self._sha.update(data)
        self.bytes += len(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self._sha.hexdigest()}"

    def read(self) -> AdapterSet:
        """The adapter in it. Raises Invalid, or Unreadable where it can't be read back now."""
        try:
            return read_adapter(self.path)
        except (OSError, MemoryError) as error:
            raise read_error(error, "the upload") from error

    def sync(self) -> None:
        """Have the bytes and the name on the disk. Raises StorageFull or ReadOnly."""
        with storage_errors():
            os.fsync(self._file)
            sync_folder(self.path.parent)

    @property
    def is_in_doubt(self) -> bool:
        """Whether its file may have a name in the store without a row in the registry."""
        return self._in_doubt

    def doubt(self) -> None:
        """From now on `discard` leaves the upload's own name until `settle` is called.

        A start knows a file in the store without a row as unacknowledged by this name; without it
        the registry would seem to have lost the row.
        """
        self._in_doubt = True

    def settle(self) -> None:
        """Its name in the store was committed, or taken back."""
        self._in_doubt = False

    def discard(self) -> None:
        """Close it and remove its name; what was stored has another.

        On a disk that refuses even that, it is left to the next start.
        """
        if self._file >= 0:
            file, self._file = self._file, -1
            with suppress(OSError):
                os.close(file)
            if not self._in_doubt:
                with suppress(OSError):
                    self.path.unlink(missing_ok=True)


class BlobStore:
    """Files in one folder, named by their SHA-256. `quota` bounds their bytes together, 0 not.

    `admit` raises StorageFull or ReadOnly while no upload may be written.
    """

    def __init__(
        self,
        folder: Path,
        quota: int = 0,
        admit: Callable[[], None] = lambda: None,
        *,
        make_folders: bool = True,
    ) -> None:
        self.folder, self.quota, self._admit = folder, quota, admit
        self.incoming_folder = folder / "incoming"
        self.quarantine_folder = folder / QUARANTINE
        if make_folders:
            for each in (folder, self.incoming_folder, self.quarantine_folder):
                _make_folder(each)

    def path(self, digest: str) -> Path:
        return self.folder / digest.removeprefix("sha256:")

    def incoming(self) -> Incoming:
        """Raises StorageFull, ReadOnly or Unwritten."""
        return Incoming(self.incoming_folder / uuid.uuid4().hex, self._admit)

    def entries(self) -> Iterator[Path]:
        """All that is in the folder of published files. Raises OSError."""
        own = (self.incoming_folder, self.quarantine_folder)
        return (entry for entry in entries_of(self.folder) if entry not in own)

    def look_at(self, digest: str) -> os.stat_result | None:
        """The status of the sound file of a digest; None where it is missing, unsound or unread.

        For `publish`, so that a large file is not hashed while others wait to write.
        """
        path = self.path(digest)
        with suppress(OSError):
            status = path.lstat()
            if fault_of(path, digest) is None:
                return status
        return None

    def publish(
        self, incoming: Incoming, used_bytes: int, sound: os.stat_result | None = None
    ) -> Blob:
        """Give a synced upload its name in the store; `used_bytes` are those stored already.

        Within a write transaction of the registry. The upload keeps its name in `incoming/` until
        it is discarded, after the commit: a file in the store that no row names is known by it as
        an upload that was not acknowledged. A sound file of this digest stays, an unsound one is
        put away. It is hashed, unless it is as it was when `look_at` gave `sound`.
        Raises StorageFull beyond the quota, StorageFull or ReadOnly as the disk says.
        """
        self._admit()
        path = self.path(incoming.digest)
        with storage_errors():
            was_there = os.path.lexists(path)
            if self.quota and not was_there and used_bytes + incoming.bytes > self.quota:
                # How much is used is a fact of all tenants together.
                raise StorageFull(f"the file does not fit: the store may hold {self.quota} bytes")
            if (
                was_there
                and not (sound and _is_untouched(path, sound))
                and (fault_of(path, incoming.digest) is not None)
            ):
                self._put_away(path)
                was_there = False
            if not was_there:
                incoming.doubt()
                _link(incoming.path, path)
            sync_folder(self.folder)
            return Blob(incoming.digest, incoming.bytes, path.lstat().st_mtime_ns)

    def check_share(self, own_bytes: int, used_bytes: int) -> None:
        """Raises StorageFull where one tenant's files would take more than would stay free.

        One tenant alone gets half of the quota, or of the disk, two a third each (dynamic
        thresholds, Choudhury and Hahne 1998): there is always room for another's.
        """
        with storage_errors():
            free = shutil.disk_usage(self.folder).free
        if self.quota:
            free = min(free, self.quota - used_bytes)
        if own_bytes > free:
            raise StorageFull(
                f"with this file the key's adapters would have {own_bytes} bytes, more than its "
                "share of the store: delete some"
            )

    def read(self, digest: str) -> AdapterSet:
        """The adapter, its bytes hashed again.

        Raises Damaged for a missing or changed file, Unreadable where the system can't read it now.
        """
        path = self.path(digest)
        try:
            if not _is_plain_file(path):
                raise Damaged(f"{digest} is not a plain file")
            adapter = read_adapter(path)
            if adapter.digest != digest:
                raise Damaged(f"the file of {digest} was changed")
        except Invalid as error:
            raise Damaged(error.message) from error
        except (OSError, MemoryError) as error:
            raise self._read_error(digest, error) from error
        return adapter

    def open(self, digest: str) -> int:
        """A descriptor of the file, which outlives a delete; the caller closes it.

        Raises Damaged where the file is gone or a link, Unreadable where it can't be opened now.
        """
        try:
            return os.open(self.path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise self._read_error(digest, error) from error

    def _read_error(self, digest: str, error: OSError | MemoryError) -> TrunklineError:
        """Damaged for a missing file or a link; where its whole folder is missing, the disk is."""
        gone = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ELOOP)
        if gone and self.folder.is_dir():
            return Damaged(f"the file of {digest} is gone")
        return read_error(error, f"the file of {digest}")

    def verify(self, digest: str) -> str | None:
        """What is wrong with the file of `digest`, or None. Changes nothing."""
        try:
            return fault_of(self.path(digest), digest)
        except (OSError, MemoryError) as error:
            return f"it can't be read now: {reason(error)}"

    def is_damaged(self, digest: str) -> bool:
        """Whether its file is gone or of other bytes: False where it can't be read now."""
        try:
            return fault_of(self.path(digest), digest) is not None
        except OSError:
            return False

    def unlink(self, digest: str) -> None:
        """Only for `adapters/collector.py`. Raises ReadOnly where the disk takes no writes."""
        with storage_errors():
            self.path(digest).unlink(missing_ok=True)
            sync_folder(self.folder)

    def quarantine(self, path: Path) -> bool:
        """Move it out of the way, for a person to look at; False on a disk that takes no writes."""
        try:
            self._put_away(path)
        except OSError:
            return False
        return True

    def _put_away(self, path: Path) -> None:
        os.replace(path, self.quarantine_folder / f"{path.name[:64]}.{uuid.uuid4().hex[:8]}")

    def clear_incoming(self) -> None:
        """At start: remove the uploads that a stop cut off; what is no file is put away."""
        for entry in entries_of(self.incoming_folder):
            try:
                if entry.is_dir() and not entry.is_symlink():
                    self._put_away(entry)
                else:
                    entry.unlink()
            except OSError as error:
                log.warning("%s stays: %s", entry, error.strerror)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ReadOnly(f"{folder} is not a folder; move it away and start again") from error
    except OSError as error:
        raise ReadOnly(f"{folder} can't be made: {error.strerror}") from error


def entries_of(folder: Path) -> Iterator[Path]:
    """What is in a folder: nothing where it is missing, as on a disk that takes no writes.

    Raises OSError.
    """
    try:
        yield from folder.iterdir()
    except FileNotFoundError:
        return


def _link(source: Path, target: Path) -> None:
    """A second name of a file; where the file system has no such thing, a copy. Raises OSError."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        copy = source.with_suffix(".copy")
        with source.open("rb") as read, copy.open("wb") as written:
            shutil.copyfileobj(read, written)
            written.flush()
            os.fsync(written.fileno())
        os.rename(copy, target)


def _is_untouched(path: Path, before: os.stat_result) -> bool:
    """Whether it is the same file, and neither its bytes nor its names were changed."""
    now = path.lstat()
    return os.path.samestat(now, before) and (
        (now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        == (before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    )


def _is_plain_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
