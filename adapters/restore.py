"""Bring a backup back into a data folder: every byte is checked before anything is put in place."""

import fcntl
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from adapters.backup_format import (
    BLOBS,
    KEYS,
    KEYS_MARK,
    REGISTRY,
    BackupRefused,
    Manifest,
    Source,
    StoredFile,
    make_private,
    read_manifest,
    source_of,
    write_synced,
)
from adapters.folders import sync_folder

NEEDED = """SELECT DISTINCT b.digest, b.mtime_ns FROM blobs b JOIN versions v ON v.digest = b.digest
    WHERE v.deleted_at IS NULL"""
_STAGE, _ASIDE = ".restore-", "replaced-"
UNFINISHED = ".restore-unfinished"  # is there from the first rename to the last
_NOT_DATA = {"lost+found"}  # of a file system's root


def restore(backup: Path, data: Path, *, replace: bool = False) -> tuple[Manifest, Path | None]:
    """Put a backup's files into `data`; its manifest, and where what was there before is now.

    `data` has to be missing or empty; with `replace` its entries are moved into a new folder below
    it, and none is deleted. All is checked before. Raises BackupRefused, with nothing changed.
    """
    with ExitStack() as stack:
        source = stack.enter_context(source_of(backup))
        manifest = read_manifest(source, backup)
        try:
            stack.enter_context(_made(data))
            stack.enter_context(_unused(data))
            before = _entries(data)
            if before and not replace:
                raise BackupRefused(
                    f"{data} is not empty; give another folder, or --replace to move its entries "
                    "aside"
                )
            stage = stack.enter_context(_stage(data))
            _extract(source, manifest, backup, stage)
            _check_trunks(manifest, backup, stage)
            _hand_to_owner(stage, data)
            return manifest, _put_in_place(stage, data, before)
        except OSError as error:
            path = error.filename or data
            raise BackupRefused(f"{path} can't be written: {error.strerror}") from error


def restore_keys(backup: Path, data: Path) -> Path | None:
    """Put back the keys file alone; where the one that was there is now. A server may run.

    Raises BackupRefused, with nothing changed.
    """
    with source_of(backup) as source:
        manifest = read_manifest(source, backup)
        if KEYS not in manifest.files:
            raise BackupRefused(f"{backup} has no {KEYS}: the server had none when it was taken")
        try:
            with _stage(data) as stage:
                _extract_file(source, KEYS, manifest.files[KEYS], backup, stage)
                _hand_to_owner(stage, data)
                aside = _link_aside(data / KEYS) if os.path.lexists(data / KEYS) else None
                os.replace(stage / KEYS, data / KEYS)
                sync_folder(data)
                return aside
        except OSError as error:
            path = error.filename or data
            raise BackupRefused(f"{path} can't be written: {error.strerror}") from error


def _link_aside(path: Path) -> Path:
    """A second name for a file, of the time; a folder is renamed."""
    aside = path.with_name(f"{path.name}.{_ASIDE}{_now_and_unique()}")
    if path.is_dir() and not path.is_symlink():
        os.rename(path, aside)
    else:
        os.link(path, aside, follow_symlinks=False)
    return aside


def _now_and_unique() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"


@contextmanager
def _made(data: Path) -> Iterator[None]:
    """The folder is there; after an error it is gone again where it was not."""
    made = not data.exists()
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                data.rmdir()
        raise


@contextmanager
def _unused(data: Path) -> Iterator[None]:
    """The locks of the trunk folders that are there, so that no server begins to use them."""
    with ExitStack() as stack:
        for path in sorted(data.glob("*/lock")):
            lock = stack.enter_context(path.open("rb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BackupRefused(f"a server uses {path.parent}; stop it first") from error
        yield


def _entries(data: Path) -> list[Path]:
    """What a data folder has; what earlier restores moved aside doesn't count."""
    return sorted(
        path
        for path in data.iterdir()
        if path.name not in _NOT_DATA and not path.name.startswith((_STAGE, _ASIDE))
    )


@contextmanager
def _stage(data: Path) -> Iterator[Path]:
    """A folder in `data`, so that its files come into place by renames, also at a mount point."""
    folder = data / f"{_STAGE}{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _extract(source: Source, manifest: Manifest, backup: Path, stage: Path) -> None:
    for name, stored in manifest.files.items():
        _extract_file(source, name, stored, backup, stage)


def _extract_file(source: Source, name: str, stored: StoredFile, backup: Path, stage: Path) -> None:
    path = stage / name
    make_private(path.parent)
    with source.open(name) as file:
        found = write_synced(path, file)
    if found != stored:
        raise BackupRefused(
            f"{name} in {backup} is damaged: it has {found.bytes} bytes of sha256 "
            f"{found.sha256[:12]}, the manifest says {stored.bytes} of {stored.sha256[:12]}"
        )


def _check_trunks(manifest: Manifest, backup: Path, stage: Path) -> None:
    """Every registry is sound, and every file that its live rows name is there."""
    for trunk in manifest.trunks:
        registry = stage / trunk / REGISTRY
        if not registry.is_file():
            raise BackupRefused(f"{trunk}/{REGISTRY} is not in {backup}")
        try:
            needed = _needed(registry)
        except sqlite3.Error as error:
            raise BackupRefused(f"{trunk}/{REGISTRY} in {backup} is damaged: {error}") from error
        for digest, mtime_ns in needed.items():
            _check_file(f"{trunk}/{BLOBS}/{digest}", mtime_ns, manifest, backup, stage)
        for folder in (stage / trunk, stage / trunk / BLOBS):
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(folder)


def _needed(registry: Path) -> dict[str, int]:
    with closing(sqlite3.connect(registry)) as database:
        (fault,) = database.execute("PRAGMA quick_check").fetchone()
        if fault != "ok":
            raise sqlite3.DatabaseError(fault)
        return {digest.removeprefix("sha256:"): at for digest, at in database.execute(NEEDED)}


def _check_file(name: str, mtime_ns: int, manifest: Manifest, backup: Path, stage: Path) -> None:
    path = stage / name
    if name in manifest.left_out:
        return
    if name not in manifest.files or manifest.files[name].sha256 != path.name:
        raise BackupRefused(f"{name} is not in {backup}, and its registry names it")
    os.utime(path, ns=(mtime_ns, mtime_ns))  # else every start would hash it again


def _hand_to_owner(stage: Path, data: Path) -> None:
    """Root restores for the user that the folder belongs to."""
    owner = data.stat()
    if os.geteuid() == 0 and (owner.st_uid, owner.st_gid) != (0, 0):
        for path in (stage, *stage.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)


def _put_in_place(stage: Path, data: Path, before: list[Path]) -> Path | None:
    """Keys first: at no moment are there adapters without the keys that guard them.

    A stop in between leaves UNFINISHED behind, and with it no server starts.
    """
    unfinished = data / UNFINISHED
    unfinished.touch(mode=0o600)
    sync_folder(data)
    aside = _move_aside(stage, data, before) if before else None
    for name in (KEYS_MARK, KEYS):
        if (stage / name).exists():
            os.replace(stage / name, data / name)
    sync_folder(data)
    for path in sorted(stage.iterdir()):
        os.rename(path, data / path.name)
    sync_folder(data)
    unfinished.unlink()
    sync_folder(data)
    return aside


def cut_off(data: Path) -> str | None:
    """The sentence for a data folder whose restore was cut off, else None."""
    if not (data / UNFINISHED).exists():
        return None
    return (
        f"a restore into {data} was cut off, and the folder is neither what it was nor the backup; "
        f"nothing was deleted: `trunkline restore BACKUP {data} --replace` does it again"
    )


def _move_aside(stage: Path, data: Path, before: list[Path]) -> Path:
    aside = data / f"{_ASIDE}{_now_and_unique()}"
    aside.mkdir(mode=0o700)
    for path in before:
        if path.name == KEYS and (stage / KEYS).exists():
            os.link(path, aside / KEYS)  # it is replaced in one step, never missing
        else:
            os.rename(path, aside / path.name)
    return aside
