"""What a backup is: its files by name, each with its size and digest, in a folder or a tar file.

    backup.json                       the manifest; it carries its own digest
    keys.json                         where the server has keys
    keys.mark                         there were keys, so a server without them does not start
    TRUNK/registry.sqlite             a snapshot, without a write-ahead log
    TRUNK/blobs/<64 hex>              every file that a live version names

Nothing here imports torch: the commands that use it start at once.
"""

import errno
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

FORMAT = "trunkline-backup/1"
MANIFEST, REGISTRY, BLOBS = "backup.json", "registry.sqlite", "blobs"
KEYS, KEYS_MARK = "keys.json", "keys.mark"
TAR = ".tar"
MAX_MANIFEST_BYTES = 256 << 20  # 1,000,000 files have some 150 MB
_CHUNK = 1 << 20
# A trunk's folder has the name of its backbone's folder in it, which may be any; a name with bytes
# that are not UTF-8 has them as surrogates, as os.fsdecode makes them.
_TRUNK = r"(?!\.\.?/)[^/\0]{1,255}"
_NAME = re.compile(rf"{KEYS}|{KEYS_MARK}|{_TRUNK}/({re.escape(REGISTRY)}|{BLOBS}/[0-9a-f]{{64}})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BackupRefused(ValueError):
    """A backup or a restore that is not done, with the sentence that names the file."""


@dataclass(frozen=True)
class StoredFile:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    created_at: str  # ISO 8601, UTC
    version: str  # of trunkline
    trunks: dict[str, dict[str, int]]  # folder -> counts: names, versions, files, bytes
    left_out: tuple[str, ...]  # names of damaged files
    files: dict[str, StoredFile]

    def to_bytes(self) -> bytes:
        text = json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{digest}\n{text}".encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Raises BackupRefused."""
        digest, _, text = data.partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise BackupRefused(f"{where} is damaged: its digest is not that of its text")
        try:
            return cls._of(json.loads(text))
        except (ValueError, TypeError, KeyError) as error:
            raise BackupRefused(f"{where} is no manifest of {FORMAT}") from error

    @classmethod
    def _of(cls, fields: dict[str, Any]) -> "Manifest":
        if fields.pop("format") != FORMAT:
            raise ValueError("another format")
        files = {name: StoredFile(**each) for name, each in fields.pop("files").items()}
        for name, each in files.items():
            if not (_NAME.fullmatch(name) and _SHA256.fullmatch(each.sha256) and each.bytes >= 0):
                raise ValueError("a file that no backup has")
        left_out = tuple(fields.pop("left_out"))
        return cls(files=files, left_out=left_out, **fields)


class HashedReader:
    """A file that is read once, its bytes counted and hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha, self.bytes = file, hashlib.sha256(), 0

    def read(self, size: int = _CHUNK) -> bytes:
        part = self._file.read(size)
        self._sha.update(part)
        self.bytes += len(part)
        return part

    def copy_to(self, target: IO[bytes]) -> None:
        while part := self.read():
            target.write(part)

    @property
    def stored(self) -> StoredFile:
        return StoredFile(self.bytes, self._sha.hexdigest())


class Sink(Protocol):
    """Where a backup is written."""

    def add(self, name: str, file: IO[bytes], size: int) -> StoredFile: ...

    def drop(self, name: str) -> None:
        """It is not to be in the manifest."""


class FolderSink:
    """A folder that only its owner may enter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, name: str, file: IO[bytes], size: int) -> StoredFile:
        """Write a file and have it on the disk. `size` is not needed here."""
        path = self._folder / name
        make_private(path.parent)
        return write_synced(path, file)

    def drop(self, name: str) -> None:
        (self._folder / name).unlink()


class TarSink:
    """An uncompressed tar file: adapters are random bits, which no compression makes smaller."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def add(self, name: str, file: IO[bytes], size: int) -> StoredFile:
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o600
        reader = HashedReader(file)
        self._archive.addfile(member, reader)
        return reader.stored

    def drop(self, name: str) -> None:
        """What is written stays: nobody reads what the manifest does not name."""


def make_private(folder: Path) -> None:
    """The folder, and those above it that are missing, of mode 0700."""
    if not folder.exists():
        make_private(folder.parent)
        folder.mkdir(mode=0o700)


def write_synced(path: Path, file: IO[bytes]) -> StoredFile:
    """A new file of mode 0600, on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    reader = HashedReader(file)
    with os.fdopen(descriptor, "wb") as target:
        reader.copy_to(target)
        target.flush()
        os.fsync(target.fileno())
    return reader.stored


class Source(Protocol):
    """Where a backup is read from."""

    def open(self, name: str) -> IO[bytes]:
        """Raises BackupRefused, naming the file, where it is missing."""
        ...


class FolderSource:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, name: str) -> IO[bytes]:
        path = self._folder / name
        try:
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
        except OSError as error:
            raise BackupRefused(_unreadable(path, name, error)) from error


def _unreadable(path: Path, name: str, error: OSError) -> str:
    if error.errno != errno.ENOENT:
        return f"{path} can't be read: {error.strerror}"
    if name == MANIFEST:
        return f"{path} is missing: {path.parent} is not a backup that `trunkline backup` wrote"
    return f"{path} is missing: the backup is not whole"


class TarSource:
    def __init__(self, path: Path, archive: tarfile.TarFile) -> None:
        self._path, self._archive = path, archive

    def open(self, name: str) -> IO[bytes]:
        try:
            file = self._archive.extractfile(name)
        except (KeyError, tarfile.TarError, OSError) as error:
            raise BackupRefused(f"{name} is not in {self._path}: is the file cut?") from error
        if file is None:
            raise BackupRefused(f"{name} in {self._path} is no file")
        return file


@contextmanager
def source_of(backup: Path) -> Iterator[Source]:
    """The backup at a path, a folder or a tar file. Raises BackupRefused."""
    if backup.is_dir():
        yield FolderSource(backup)
        return
    try:
        archive = tarfile.open(backup, "r:")  # noqa: SIM115 -- closed below
    except (OSError, tarfile.TarError) as error:
        why = getattr(error, "strerror", None) or "it is neither a folder nor a tar file"
        raise BackupRefused(f"{backup} can't be read as a backup: {why}") from error
    with archive:
        yield TarSource(backup, archive)


def read_manifest(source: Source, backup: Path) -> Manifest:
    """Raises BackupRefused."""
    where = f"{backup}/{MANIFEST}"
    with source.open(MANIFEST) as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BackupRefused(f"{where} is longer than any manifest")
    return Manifest.from_bytes(data, where)


def in_memory(data: bytes) -> IO[bytes]:
    return io.BytesIO(data)
