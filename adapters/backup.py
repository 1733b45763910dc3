"""A backup of a data folder while a server uses it: registry, adapter files and keys, consistent.

The registry is copied by SQLite's backup function, which sees one committed state. Files are
immutable, so they are copied afterwards. One that is gone by then was deleted in between: a new
snapshot is taken, and no longer names it.
"""

import os
import shutil
import sqlite3
import tarfile
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from adapters import readonly
from adapters.backup_format import (
    BLOBS,
    KEYS,
    KEYS_MARK,
    MANIFEST,
    REGISTRY,
    TAR,
    BackupRefused,
    FolderSink,
    Manifest,
    Sink,
    StoredFile,
    TarSink,
    in_memory,
)
from adapters.folders import sync_folder
from adapters.mark import mark_of

SNAPSHOTS = 20  # deletes between a snapshot and the copy of a file; then the disk is at fault
LIVE = """SELECT DISTINCT b.digest, b.bytes FROM blobs b JOIN versions v ON v.digest = b.digest
    WHERE v.deleted_at IS NULL ORDER BY b.digest"""
MARKED = b"there were keys\n"  # only whether the file is there counts
COUNTS = "SELECT count(DISTINCT name), count(*) FROM versions WHERE deleted_at IS NULL"


@dataclass
class Wanted:
    """What is to be backed up. `trunk` names one folder of the data folder; None takes all."""

    data: Path
    keys: Path
    version: str  # of trunkline
    trunk: str | None = None
    skip_damaged: bool = False


@dataclass
class _Taken:
    trunks: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def back_up(wanted: Wanted, out: Path) -> Manifest:
    """Write a backup to `out`, a folder, or a file where its name ends in .tar.

    It is there whole or not at all, and only its owner may read it: it has the keys' hashes.
    Raises BackupRefused, with nothing written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir()) and out.suffix != TAR):
        raise BackupRefused(f"{out} exists already; a backup never replaces another")
    if not out.absolute().parent.is_dir():
        raise BackupRefused(f"{out} can't be written: there is no folder {out.parent}")
    trunks = _trunks(wanted)
    try:
        with _tar_at(out) if out.suffix == TAR else _folder_at(out) as sink:
            return _fill(sink, wanted, trunks)
    except OSError as error:
        raise BackupRefused(
            f"{error.filename or out} can't be written: {error.strerror}"
        ) from error


def _trunks(wanted: Wanted) -> list[Path]:
    """The trunks' folders. Raises BackupRefused for one that has lost its registry."""
    traces = (REGISTRY, mark_of(Path(REGISTRY)).name, f"{BLOBS}/{'[0-9a-f]' * 64}")
    found = sorted(folder for folder in wanted.data.glob("*/") if _has_any(folder, traces))
    if not found:
        raise BackupRefused(f"{wanted.data} has no trunk folder with a {REGISTRY} in it")
    if wanted.trunk is not None:
        there = ", ".join(folder.name for folder in found)
        found = [folder for folder in found if folder.name == wanted.trunk]
        if not found:
            raise BackupRefused(f"{wanted.data} has no trunk folder {wanted.trunk}; it has {there}")
    lost = next((folder for folder in found if not (folder / REGISTRY).exists()), None)
    if lost is not None:
        raise BackupRefused(
            f"{lost / REGISTRY} is missing, so this trunk can't be backed up: `trunkline recover "
            f"{lost}` shows what is left, and --trunk NAME backs up another one alone"
        )
    return found


def _has_any(folder: Path, patterns: Iterable[str]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


@contextmanager
def _folder_at(out: Path) -> Iterator[Sink]:
    """Filled beside `out`, which it becomes by a rename; in place of an empty folder too."""
    out = out.absolute()
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir(mode=0o700)
        yield FolderSink(folder)
        for each in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sync_folder(each)
        os.rename(folder, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _tar_at(out: Path) -> Iterator[Sink]:
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                yield TarSink(archive)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, out)  # never in place of what came there meanwhile
        sync_folder(out.absolute().parent)
    finally:
        part.unlink(missing_ok=True)


def _fill(sink: Sink, wanted: Wanted, trunks: list[Path]) -> Manifest:
    taken = _Taken()
    for trunk in trunks:
        _add_trunk(sink, trunk, taken, wanted.skip_damaged)
    if wanted.keys.exists():  # the file is replaced by a rename: it is always whole
        data = wanted.keys.read_bytes()
        taken.files[KEYS] = sink.add(KEYS, in_memory(data), len(data))
    if wanted.keys.with_suffix(Path(KEYS_MARK).suffix).exists():
        taken.files[KEYS_MARK] = sink.add(KEYS_MARK, in_memory(MARKED), len(MARKED))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    left_out = tuple(taken.left_out)
    manifest = Manifest(now, wanted.version, taken.trunks, left_out, taken.files)
    text = manifest.to_bytes()
    sink.add(MANIFEST, in_memory(text), len(text))
    return manifest


def _add_trunk(sink: Sink, trunk: Path, taken: _Taken, skip_damaged: bool) -> None:
    copied: dict[str, StoredFile] = {}
    with tempfile.TemporaryDirectory(prefix="trunkline-backup-") as folder:
        snapshot = Path(folder) / REGISTRY
        for _ in range(SNAPSHOTS):
            live = _snapshot(trunk / REGISTRY, snapshot)
            missing = _add_files(sink, trunk, live, copied)
            if not missing:
                break
            faults, again = missing, _live_now(trunk / REGISTRY)
            if faults.keys() <= again.keys():  # no delete took them
                _judge(trunk, faults, skip_damaged)
                break
        else:
            raise BackupRefused(f"{trunk}: files go away as fast as they are copied; try again")
        taken.left_out += [f"{trunk.name}/{BLOBS}/{name}" for name in sorted(missing)]
        kept = {name: copied[name] for name in live if name in copied}
        for name in copied.keys() - kept.keys():  # deleted since it was copied
            sink.drop(f"{trunk.name}/{BLOBS}/{name}")
        with snapshot.open("rb") as file:
            registry = sink.add(f"{trunk.name}/{REGISTRY}", file, snapshot.stat().st_size)
        counts = _counts(snapshot) | {
            "files": len(kept),
            "bytes": sum(each.bytes for each in kept.values()),
        }
    taken.trunks[trunk.name] = counts
    taken.files[f"{trunk.name}/{REGISTRY}"] = registry
    taken.files |= {f"{trunk.name}/{BLOBS}/{name}": each for name, each in kept.items()}


def _judge(trunk: Path, faults: dict[str, str], skip_damaged: bool) -> None:
    if not skip_damaged:
        name, why = next(iter(sorted(faults.items())))
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise BackupRefused(
            f"{trunk / BLOBS / name} {why}{more}: push the adapter again or delete it, or leave "
            "damaged files out with --skip-damaged"
        )


def _add_files(
    sink: Sink, trunk: Path, live: dict[str, int], copied: dict[str, StoredFile]
) -> dict[str, str]:
    """Copy those that are not copied yet; what is wrong with the others, by name."""
    faults = {}
    for name, size in live.items():
        if name not in copied:
            fault = _add_file(sink, trunk, name, size, copied)
            if fault is not None:
                faults[name] = fault
    return faults


def _add_file(
    sink: Sink, trunk: Path, name: str, size: int, copied: dict[str, StoredFile]
) -> str | None:
    path = trunk / BLOBS / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return "is missing"
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size != size:
            return "has another size than the registry says"
        stored = sink.add(f"{trunk.name}/{BLOBS}/{name}", file, size)
    if stored.sha256 != name:
        sink.drop(f"{trunk.name}/{BLOBS}/{name}")
        return "has other bytes than its digest says"
    copied[name] = stored
    return None


def _snapshot(registry: Path, target: Path) -> dict[str, int]:
    """One committed state of the registry, as one file; the sizes of the files it needs."""
    target.unlink(missing_ok=True)
    with _opened(registry) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")
        (fault,) = copy.execute("PRAGMA quick_check").fetchone()
        if fault != "ok":
            raise BackupRefused(f"{registry} is damaged: {fault}")
        return _live(copy)


def _live_now(registry: Path) -> dict[str, int]:
    with _opened(registry) as source:
        return _live(source)


def _live(database: sqlite3.Connection) -> dict[str, int]:
    return {digest.removeprefix("sha256:"): size for digest, size in database.execute(LIVE)}


def _counts(snapshot: Path) -> dict[str, int]:
    with closing(sqlite3.connect(snapshot)) as database:
        names, versions = database.execute(COUNTS).fetchone()
    return {"names": names, "versions": versions}


@contextmanager
def _opened(registry: Path) -> Iterator[sqlite3.Connection]:
    """The live database; of a folder that takes no writes a copy. Raises BackupRefused."""
    copy = None
    if readonly.refusal(registry.parent, registry) is not None:
        copy = readonly.copy_registry(registry)
        registry = Path(copy.name) / registry.name
    uri = f"{registry.absolute().as_uri()}?mode=rw"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=30)) as database:
            yield database
    except sqlite3.Error as error:
        raise BackupRefused(f"{registry} can't be read: {error}") from error
    finally:
        if copy is not None:
            copy.cleanup()
