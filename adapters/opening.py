"""Opening a data folder: its lock, its disk, and its registry and files held against each other."""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters import readonly
from adapters.disk import Disk
from adapters.errors import ReadOnly, StorageFull
from adapters.folders import take_lock
from adapters.reconciliation import reconcile
from adapters.registry import Registry
from adapters.registry_file import demand_registry
from adapters.reserve import Reserve
from adapters.store import QUARANTINE, BlobStore

REGISTRY = "registry.sqlite"
BLOBS = "blobs"  # the folder of published files


@dataclass
class DataFolder:
    """One folder of one backbone, open until `close`."""

    store: BlobStore
    registry: Registry
    disk: Disk
    reserve: Reserve
    lock: int  # descriptor; the lock ends with it
    close: Callable[[], None]


def open_folder(folder: Path, quota: int, reserve_bytes: int) -> DataFolder:
    """Raises InUse where another process has it, RegistryLost, StorageFull or ReadOnly.

    Where the disk takes no writes, or has no room for SQLite to open a file, a copy of the registry
    is opened in its place, and no write is tried.
    """
    refused = readonly.refusal(folder, folder / REGISTRY)
    with ExitStack() as opened:
        lock = lock_folder(folder) if refused is None else readonly.lock(folder, refused)
        opened.callback(os.close, lock)
        reserve = Reserve(folder / "reserve", 0 if refused else reserve_bytes)
        found = None if refused else _open_in_place(folder, quota, reserve)
        if found is None:
            refused = refused or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            found = _open_copy(folder, quota, reserve, refused, opened)
        store, registry, disk = found
        opened.callback(reserve.take_back)  # the next start may need it to open the registry
        opened.callback(registry.close)
        reconcile(store, registry)
        opened.callback(disk.close)
        return DataFolder(store, registry, disk, reserve, lock, opened.pop_all().close)


def _open_in_place(
    folder: Path, quota: int, reserve: Reserve
) -> tuple[BlobStore, Registry, Disk] | None:
    """None where even the reserve has no room for what SQLite writes to open a file."""
    disk = Disk(folder, reserve, None, folder / BLOBS / QUARANTINE)
    store = BlobStore(folder / BLOBS, quota, disk.admit_upload)
    try:
        reserve.spend(partial(demand_registry, folder / REGISTRY, store))
        return store, reserve.spend(partial(Registry, folder / REGISTRY)), disk
    except StorageFull:
        return None


def _open_copy(
    folder: Path, quota: int, reserve: Reserve, refused: OSError, opened: ExitStack
) -> tuple[BlobStore, Registry, Disk]:
    disk = Disk(folder, reserve, refused, folder / BLOBS / QUARANTINE)
    store = BlobStore(folder / BLOBS, quota, disk.admit_upload, make_folders=False)
    copy = Path(opened.enter_context(readonly.copy_registry(folder / REGISTRY))) / REGISTRY
    demand_registry(copy, store, shown=folder / REGISTRY)
    registry = Registry(copy, disk.admit_write)
    registry.path = folder / REGISTRY
    return store, registry, disk


def lock_folder(folder: Path) -> int:
    """Raises InUse or ReadOnly; the lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ReadOnly(f"{folder} can't be written: {error.strerror}") from error
    take_lock(descriptor, fcntl.LOCK_EX, folder)
    return descriptor
