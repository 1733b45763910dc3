"""BlobStore: adapter files under their digests. A file is there whole, or not at all."""

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import Damaged, Invalid, StorageFull, TrunklineError
from adapters.format import AdapterSet, read_adapter
from adapters.storage_errors import read_error, reason, storage_errors


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
        """Have the bytes on the disk. Raises StorageFull or ReadOnly."""
        with storage_errors():
            os.fsync(self._file)

    def discard(self) -> None:
        """Close it and take it away; nothing where it was stored.

        On a disk that refuses even that, it is left to the sweep of the next start.
        """
        if self._file >= 0:
            file, self._file = self._file, -1
            with suppress(OSError):
                os.close(file)
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _hand_over(self) -> Blob:
        with storage_errors():
            mtime_ns = os.fstat(self._file).st_mtime_ns
            os.close(self._file)
        self._file = -1
        return Blob(self.digest, self.bytes, mtime_ns)


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
        self.quarantine_folder = folder / "quarantine"
        if make_folders:
            with storage_errors():
                for each in (folder, self.incoming_folder, self.quarantine_folder):
                    each.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.folder / digest.removeprefix("sha256:")

    def incoming(self) -> Incoming:
        """Raises StorageFull, ReadOnly or Unwritten."""
        return Incoming(self.incoming_folder / uuid.uuid4().hex, self._admit)

    def commit(self, incoming: Incoming, used_bytes: int) -> Blob:
        """Publish a synced upload under its digest; `used_bytes` are those stored already.

        Raises StorageFull beyond the quota, or as the disk says; the upload is still there then.
        """
        self._admit()
        path = self.path(incoming.digest)
        was_there = path.exists()
        if self.quota and not was_there and used_bytes + incoming.bytes > self.quota:
            raise StorageFull(f"the store may hold {self.quota} bytes and has {used_bytes}")
        try:
            with storage_errors():
                os.replace(incoming.path, path)
                _sync_folder(self.folder)
        except TrunklineError:
            if not was_there:
                path.unlink(missing_ok=True)
            raise
        return incoming._hand_over()

    def read(self, digest: str) -> AdapterSet:
        """The adapter, its bytes hashed again.

        Raises Damaged for a missing or changed file, and then has put it away; Unreadable where
        the system can't read it now.
        """
        path = self.path(digest)
        try:
            if not _is_plain_file(path):
                raise Damaged(f"{digest} is not a plain file")
            adapter = read_adapter(path)
            if adapter.digest != digest:
                raise Damaged(f"the file of {digest} was changed")
        except (Damaged, Invalid) as error:
            self.quarantine(path)
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
        path = self.path(digest)
        try:
            if not _is_plain_file(path):
                return "not a plain file"
            return None if _hash(path) == digest else "its bytes are not those of its digest"
        except (OSError, MemoryError) as error:
            if isinstance(self._read_error(digest, error), Damaged):
                return "the file is gone"
            return f"can't be read now: {reason(error)}"

    def delete(self, digest: str) -> None:
        """Raises ReadOnly where the disk takes no writes."""
        with storage_errors():
            self.path(digest).unlink(missing_ok=True)
            _sync_folder(self.folder)

    def quarantine(self, path: Path) -> None:
        """Out of the way, for a person to look at; on a disk without writes it stays."""
        target = self.quarantine_folder / f"{path.name}.{uuid.uuid4().hex[:8]}"
        try:
            os.replace(path, target)
        except OSError:
            return

    def sweep(self, known: Mapping[str, Blob]) -> list[str]:
        """At start: drop what no version names, put away what is damaged or linked.

        `known` is by digest. A file is hashed where its size or time of change are not those it
        was stored with. Returns the known digests that have no sound file.
        """
        with storage_errors():
            for entry in self.incoming_folder.iterdir():
                entry.unlink()
            sound = set()
            for entry in self.folder.iterdir():
                if entry in (self.incoming_folder, self.quarantine_folder):
                    continue
                blob = known.get(f"sha256:{entry.name}")
                if blob is None:
                    self._drop(entry)
                elif self._is_damaged(entry, blob):
                    self.quarantine(entry)
                else:
                    sound.add(blob.digest)
        return sorted(set(known) - sound)

    def _drop(self, entry: Path) -> None:
        """An orphan: a file of a digest that nothing names is deleted, anything else put away."""
        if _is_plain_file(entry) and len(entry.name) == 64:
            entry.unlink()
        else:
            self.quarantine(entry)

    def _is_damaged(self, entry: Path, blob: Blob) -> bool:
        status = entry.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != blob.bytes:
            return True
        return status.st_mtime_ns != blob.mtime_ns and _hash(entry) != blob.digest


def _is_plain_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
