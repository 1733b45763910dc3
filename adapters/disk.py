"""Disk: whether the data folder takes writes. A thread looks; /ready, /info and /metrics report."""

import errno
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import ReadOnly, StorageFull
from adapters.reserve import Reserve
from adapters.storage_errors import FULL, FULL_SENTENCE, NO_WRITES, NOTHING_STORED, REPAIR_S, reason

log = logging.getLogger("trunkline.disk")

LOOK_S = 5.0
SMALL_BYTES = 64 << 10  # with less left than this a disk counts as full


@dataclass(frozen=True)
class Fault:
    """What is off: the code that uploads get now, and a sentence without a path."""

    code: str  # read_only or storage_full
    message: str


class Disk:
    """`refusal` is the OSError of a folder that took no writes at the start: then none is tried.

    `tidy` is called after each look at a disk that takes writes: deletes that failed are done then.
    """

    def __init__(
        self, folder: Path, reserve: Reserve, refusal: OSError | None, quarantine: Path
    ) -> None:
        self._folder, self.reserve, self._refusal = folder, reserve, refusal
        self._quarantine = quarantine
        self.fault: Fault | None = None
        self.quarantined = 0  # files put away for a person to look at, as of the last look
        self._wake, self._closed = threading.Event(), False
        self._watch: threading.Thread | None = None
        self.look()

    def admit_write(self) -> None:
        """Raises ReadOnly or StorageFull where nothing is written for as long as we live."""
        if self._refusal is not None:
            sentence = f"{_took_none(self._refusal)}; {NOTHING_STORED}"
            if self._refusal.errno in FULL:
                raise StorageFull(sentence)
            raise ReadOnly(sentence, retry_after_s=REPAIR_S)

    def admit_upload(self) -> None:
        """Raises ReadOnly or StorageFull while no upload may begin or go on."""
        self.admit_write()
        if not self.reserve.whole:
            raise StorageFull(FULL_SENTENCE)

    def look(self) -> None:
        """Say anew what is off; take the reserve back where there is room again."""
        if self._refusal is None:
            self.reserve.take_back()
        with suppress(OSError):  # a folder that takes no writes may have none
            self.quarantined = len(os.listdir(self._quarantine))
        fault = self._find_fault()
        if fault != self.fault:
            if fault is not None:
                log.warning("%s", fault.message)
            else:
                log.warning("the data folder takes writes again")
        self.fault = fault

    def watch(self, tidy: Callable[[], None]) -> None:
        self._watch = threading.Thread(target=self._run, args=(tidy,), name="disk", daemon=True)
        self._watch.start()

    def wake(self) -> None:
        """Look soon: something was freed, or a write failed."""
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        if self._watch is not None:
            self._watch.join()

    def _run(self, tidy: Callable[[], None]) -> None:
        while not self._closed:
            self._wake.wait(LOOK_S)
            self._wake.clear()
            if not self._closed:
                try:
                    self.look()
                    if self.fault is None or self.fault.code == StorageFull.code:
                        tidy()  # deleting works on a full disk
                except Exception:  # the next look may do better; without a thread there is none
                    log.exception("looking at the data folder failed")

    def _find_fault(self) -> Fault | None:
        if self._refusal is not None:
            return _fault_of_start(self._refusal)
        refusal = self._refuses_writes()
        if refusal is not None:
            sentence = f"the data folder takes no writes ({reason(refusal)}): uploads, deletes, "
            return Fault("read_only", sentence + "aliases and pins are refused until it does again")
        if not self.reserve.whole or self._is_full():
            return Fault(
                "storage_full",
                "the disk is full: uploads are refused, deletes work; delete versions or make room",
            )
        return None

    def _refuses_writes(self) -> OSError | None:
        """What keeps this process from writing here, found without a write."""
        if not os.access(self._folder, os.W_OK | os.X_OK, effective_ids=True):
            return OSError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            os.close(os.open(self._folder / "lock", os.O_WRONLY | os.O_CLOEXEC))
        except OSError as error:
            return error if error.errno in NO_WRITES else None
        return None

    def _is_full(self) -> bool:
        try:
            status = os.statvfs(self._folder)
        except OSError:
            return False
        return bool(status.f_blocks) and status.f_bavail * status.f_frsize < SMALL_BYTES


def _took_none(refusal: OSError) -> str:
    return f"the data folder took no writes at the start ({reason(refusal)})"


def _fault_of_start(refusal: OSError) -> Fault:
    code = StorageFull.code if refusal.errno in FULL else ReadOnly.code
    return Fault(
        code,
        f"{_took_none(refusal)}: uploads, deletes, aliases and pins are refused; "
        "restart the server when it does again",
    )
