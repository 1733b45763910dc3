"""The library of adapters: registry, store, leases and slots, kept in step.

Every operation either happened, and is on the disk, or changed nothing.
"""

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from adapters import readonly
from adapters.conditions import UNCONDITIONAL, Condition
from adapters.disk import Disk
from adapters.errors import (
    Damaged,
    InUse,
    Invalid,
    NameConflict,
    NoEffect,
    ReadOnly,
    StorageFull,
    TrunklineError,
    Unreadable,
    Unwritten,
)
from adapters.format import AdapterSet
from adapters.leases import Lease, LeaseBook
from adapters.listing import Wanted, page_by_count
from adapters.names import check_name
from adapters.probe import Probe
from adapters.registry import Registry
from adapters.reserve import Reserve
from adapters.seeds import Seed, Unusable, printable, seeds_in
from adapters.slots import SlotPool
from adapters.store import BlobStore, Incoming, digest_of
from adapters.validate import MAX_RANK, validate
from adapters.versions import Named, Record, Version
from model.checkpoint import Backbone
from model.encoder import Encoder
from model.heads import TrunkHeads

log = logging.getLogger("trunkline.adapters")


@dataclass(frozen=True)
class Upload:
    """What an upload asks for besides its bytes."""

    name: str
    who: str
    activate: bool = True
    allow_zero: bool = False
    condition: Condition = UNCONDITIONAL


@dataclass
class Usage:
    """Of one name, since the start of the process."""

    requests: int = 0
    last_used: float | None = None  # seconds since 1970


class Library:
    """One data folder, of one backbone, used by one process.

    Raises InUse where another process has the folder.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        encoder: Encoder,
        slots: Callable[[Callable[[str], AdapterSet]], SlotPool],
        *,
        quota: int = 0,
        max_rank: int = MAX_RANK,
        reserve_bytes: int = 0,
    ) -> None:
        self.backbone, self.encoder, self.max_rank = backbone, encoder, max_rank
        self._probe = Probe(encoder, TrunkHeads.of(backbone.tensors, encoder.device))
        registry = folder / "registry.sqlite"
        refused = readonly.refusal(folder, registry)
        self._lock_file = _lock(folder) if refused is None else readonly.lock(folder, refused)
        self._registry_copy: TemporaryDirectory[str] | None = None
        try:
            self.reserve = Reserve(folder / "reserve", 0 if refused else reserve_bytes)
            self._open_registry(folder, registry, refused)
        except BaseException:
            os.close(self._lock_file)
            raise
        self.store = BlobStore(
            folder / "blobs", quota, self.disk.admit_upload, make_folders=refused is None
        )
        self.leases = LeaseBook()
        self.slots = slots(self._read)
        self._tidy_up()
        self._housekeeper = ThreadPoolExecutor(1, "housekeeper")
        self._usage: dict[str, Usage] = {}
        self._usage_lock = threading.Lock()
        self.unusable: list[Unusable] = []  # files that seed() could not publish
        self._uncollected: set[str] = set()  # digests whose file or row could not be freed yet
        self.disk.watch(self._collect_again)
        for digest in self.registry.pinned():
            self.slots.pin(digest)
            self.slots.want(digest, for_jobs=False)

    def _open_registry(self, folder: Path, path: Path, refused: OSError | None) -> None:
        """The registry in its place, or a copy of it where the disk does not let it be opened."""
        if refused is None:
            self.disk = Disk(folder, self.reserve, None)
            try:
                # On a full disk the reserve has the room that SQLite needs to open a file.
                self.registry = self.reserve.spend(partial(Registry, path))
                return
            except StorageFull:
                refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.disk = Disk(folder, self.reserve, refused)
        self._registry_copy = readonly.copy_registry(path)
        copy = Path(self._registry_copy.name) / path.name
        self.registry = Registry(copy, self.disk.admit_write)

    def _tidy_up(self) -> None:
        """The start's sweep. A disk that refuses it keeps nothing from being served."""
        try:
            self.reserve.spend(self._sweep)
        except (ReadOnly, StorageFull, Unwritten, Unreadable) as error:
            log.warning("the start did not look through the stored files: %s", error)

    def _sweep(self) -> None:
        self.registry.forget_unused()
        damaged = self.store.sweep(self.registry.blobs())
        if damaged:
            log.warning("%d adapter files are damaged or gone: %s", len(damaged), damaged)
            self.registry.set_damaged(damaged)
        for digest in self.registry.damaged():
            self.verify(digest)

    def verify(self, digest: str) -> str | None:
        """Hash its file: what is wrong with it, or None. A sound file is served from now on, also
        where it was damaged before."""
        fault = self.store.verify(digest)
        if fault is None and digest in self.registry.damaged():
            self.registry.set_sound(digest)
            self.slots.forgive(digest)
            log.info("%s is sound again", digest)
        return fault

    def _read(self, digest: str) -> AdapterSet:
        try:
            return self.store.read(digest)
        except Damaged:
            try:
                self.registry.set_damaged([digest])
            except TrunklineError:
                log.warning("%s is damaged, and the registry can't be told so", digest)
            raise

    def close(self) -> None:
        self.disk.close()
        self._housekeeper.shutdown()
        self.slots.close()
        self.registry.close()
        self.reserve.take_back()  # the next start may need it to open the registry
        if self._registry_copy is not None:
            self._registry_copy.cleanup()
        os.close(self._lock_file)

    # Inference.

    def version(self, reference: str) -> Version:
        """The version a reference means now. Raises as Registry.resolve."""
        return self.registry.resolve(reference)

    def lease(self, reference: str, key: str = "") -> tuple[Version, Lease]:
        """The version a reference means, and a lease on it. Raises as Registry.resolve.

        Its load, on the account of the API key, begins where it is not resident.
        """
        while True:
            version = self.registry.resolve(reference)
            lease = self.leases.take(version.name, version.digest)
            try:
                # A delete looks at the leases after its commit: what resolves still, with the
                # lease taken, stays until the lease is released.
                if self.registry.resolve(reference) == version:
                    self.slots.want(version.digest, key=key)
                    self._count(version.name)
                    return version, lease
            except BaseException:
                lease.release()
                raise
            lease.release()

    def _count(self, name: str) -> None:
        with self._usage_lock:
            usage = self._usage.setdefault(name, Usage())
            usage.requests += 1
            usage.last_used = time.time()

    def usage(self, name: str) -> Usage:
        return self._usage.get(name, Usage())

    def page(self, wanted: Wanted) -> tuple[list[Named], str | None]:
        """A page of the list and the cursor of the next, None at the end. Raises BadCursor."""
        more = replace(wanted, limit=wanted.limit + 1)
        rows = self.registry.rows_of_page(more)
        if wanted.sort in ("used", "requests"):
            counts = self._counts(wanted.sort == "used")
            rows = page_by_count([name for name, _ in rows], counts, more)
        shown = rows[: wanted.limit]
        cursor = wanted.cursor(shown[-1][1], shown[-1][0]) if len(rows) > wanted.limit else None
        return self.registry.named_all([name for name, _ in shown]), cursor

    def _counts(self, of_last_use: bool) -> dict[str, float]:
        with self._usage_lock:
            return {
                name: (usage.last_used or 0.0) if of_last_use else usage.requests
                for name, usage in self._usage.items()
            }

    # Administration. These wait for the disk; none is to be called on the event loop.

    def check_upload(self, upload: Upload) -> None:
        """What can be refused before the body is read. Raises BadName, NameConflict, Conflict."""
        if upload.name != upload.name.lower() and self.registry.exists(upload.name.lower()):
            raise NameConflict("a name that differs by case only is taken")
        check_name(upload.name)
        self.registry.check_condition(upload.name, upload.condition)

    def publish(self, upload: Upload, incoming: Incoming) -> tuple[Version, bool]:
        """Validate, probe, store and name what was uploaded; the version, and whether it is new.

        Raises BadName, Conflict, Invalid, NoEffect, PoolFull, StorageFull or ReadOnly, and then
        nothing is stored. `incoming` is the caller's to discard.
        """
        self.check_upload(upload)
        record = self._examine(upload, incoming.read())
        incoming.sync()
        previous = self._current_digest(upload.name)
        try:
            with self.registry.writing() as connection:
                self.registry.check_condition(upload.name, upload.condition)
                blob = self.store.commit(incoming, self.registry.stored_bytes())
                number, is_new = self.registry.add(
                    connection, upload.name, blob, record, upload.who, upload.activate
                )
                version = self.registry.read(f"{upload.name}@{number}")
        except BaseException:
            self._drop_if_unnamed(incoming.digest)
            raise
        self.slots.forgive(blob.digest)
        if upload.activate and previous and self.slots.is_resident(previous):
            self.slots.want(blob.digest, for_jobs=False)  # so that a swap costs no request a load
        return version, is_new

    def _examine(self, upload: Upload, adapter: AdapterSet) -> Record:
        manifest = validate(
            adapter,
            self.backbone.config,
            self.backbone.digest,
            self.encoder.dtype,
            self.max_rank,
        )
        self.slots.check_size(adapter)
        delta = self._probe.delta(adapter)
        read_off_only = manifest.labels or manifest.calibration  # the probe does not show these
        if delta == 0 and not read_off_only and not upload.allow_zero:
            raise NoEffect(
                "the adapter changes nothing: is every B zero? (allow_zero=true takes it)"
            )
        return Record(manifest, adapter.metadata, delta)

    def _current_digest(self, name: str) -> str | None:
        if not self.registry.exists(name):
            return None
        current = self.registry.named(name).current
        return current.digest if current else None

    def _drop_if_unnamed(self, digest: str) -> None:
        """After a failure: no file stays that no version names.

        Within a write transaction: another upload of the same bytes may commit its row in between,
        and its acknowledged file must not go.
        """
        try:
            with self.registry.writing():
                if not self.registry.has_blob(digest):
                    self.store.delete(digest)
        except TrunklineError:
            log.warning("%s stays as an orphan until the next start", digest)

    def remove(
        self, name: str, number: int | None, who: str, condition: Condition = UNCONDITIONAL
    ) -> int:
        """Unpublish a name or one version of it at once; how many requests still use it.

        Its memory and its file are freed when the last of them is answered.
        """
        tombstone = partial(self.registry.remove, name, number, who, condition)
        digests = {version.digest for version in self.reserve.spend(tombstone)}
        in_flight = sum(
            self.leases.when_drained(digest, partial(self._collect_soon, digest))
            for digest in digests
        )
        if not in_flight:
            self._housekeeper.submit(lambda: None).result()  # it has collected what was before
        return in_flight

    def _collect_soon(self, digest: str) -> None:
        # The last lease is released by the device thread, which is not to wait for the disk.
        self._housekeeper.submit(self._collect, digest)

    def _collect(self, digest: str) -> None:
        """Free slot and file of a digest that no live version names."""
        try:
            if not self.reserve.spend(partial(self._forget, digest)):
                return
        except TrunklineError as error:
            log.warning("%s stays on the disk until it can be deleted: %s", digest, error)
            self._uncollected.add(digest)
        self.slots.evict(digest)
        if not self.reserve.whole:
            self.disk.wake()

    def _forget(self, digest: str) -> bool:
        """Drop the row and the file; False where a live version names the digest."""
        with self.registry.writing() as connection:
            if not self.registry.forget_blob(connection, digest):
                return False
            self.store.delete(digest)
        return True

    def _collect_again(self) -> None:
        """What a disk without writes kept from being freed. Runs on the disk's thread."""
        while self._uncollected:
            digest = self._uncollected.pop()
            self._collect(digest)
            if digest in self._uncollected:
                return

    def load(self, reference: str, timeout_s: float) -> tuple[Version, bool]:
        """Bring a version into the slots and wait for it; False where the time is over."""
        version = self.registry.resolve(reference)
        return version, self.slots.load_now(version.digest, timeout_s)

    def unload(self, reference: str, who: str) -> tuple[Version, int]:
        """Take a version out of the slots when the requests of now are answered; how many.

        A pin goes with it. Later requests load it again.
        """
        version = self.registry.resolve(reference)
        if self.slots.is_pinned(version.digest):
            self._store_unpinned(version, who)
            self.slots.unpin(version.digest)
        # Whoever pins it before those requests are answered wants it to stay.
        evict = partial(self.slots.evict, version.digest, spare_pinned=True)
        return version, self.leases.when_drained(version.digest, evict)

    def pin(self, reference: str, who: str) -> Version:
        """Load it and keep it in the slots, after a restart too. Raises PoolFull."""
        version = self.registry.resolve(reference)
        was_pinned = self.slots.is_pinned(version.digest)
        self.slots.pin(version.digest)
        try:
            self.registry.set_pinned(version.digest, True, version.name, who)
        except TrunklineError:
            if not was_pinned:
                self.slots.unpin(version.digest)
            raise
        self.slots.want(version.digest, for_jobs=False)
        return version

    def unpin(self, reference: str, who: str) -> Version:
        version = self.registry.resolve(reference)
        self._store_unpinned(version, who)
        self.slots.unpin(version.digest)
        return version

    def _store_unpinned(self, version: Version, who: str) -> None:
        """On a full disk too: what an operator does to relieve a server is not refused."""
        self.reserve.spend(
            partial(self.registry.set_pinned, version.digest, False, version.name, who)
        )

    def seed(self, folder: Path) -> None:
        """Publish the files of a folder, under their paths in it, that were never published.

        What was deleted or rolled back since stays so. A file that can't be published is logged
        and is in `unusable`; it does not keep the others from being served.
        """
        faults = [self._seed(seed, folder) for seed in seeds_in(folder)]
        self.unusable = [fault for fault in faults if fault is not None]

    def _seed(self, seed: Seed, folder: Path) -> Unusable | None:
        file = printable(str(seed.path.relative_to(folder)))
        try:
            check_name(seed.name)
            self._publish_seed(seed, file)
            return None
        except (TrunklineError, OSError) as error:
            message = getattr(error, "message", None) or getattr(error, "strerror", None)
            reason = "unreadable" if isinstance(error, OSError) else error.code
            if isinstance(error, Invalid):
                reason = error.details["reason"]
            message = str(message or error)
            log.warning("%s in %s can't be served (%s): %s", file, folder, reason, message)
            return Unusable(file, printable(seed.name), reason, message)

    def _publish_seed(self, seed: Seed, file: str) -> None:
        data = seed.read()
        if self.registry.knows(seed.name, digest_of(data)):
            return  # before a byte is written: the disk may take none
        incoming = self.store.incoming()
        try:
            incoming.write(data)
            self.publish(Upload(seed.name, who=f"file {file}"), incoming)
        finally:
            incoming.discard()


def _lock(folder: Path) -> int:
    """Raises InUse or ReadOnly; the lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ReadOnly(f"{folder} can't be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InUse(f"another server uses {folder}; give this one a --data folder") from error
    return descriptor
