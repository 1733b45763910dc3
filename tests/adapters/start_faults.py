"""Faults of the files of a data folder, as the start matrix makes them."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Fault = Callable[[Path], None]


def missing(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path) -> None:
    os.truncate(path, 0)


def truncated(part: float) -> Fault:
    """To a part of its bytes; 0: to one byte, 1: by one byte."""

    def cut(path: Path) -> None:
        size = path.stat().st_size
        os.truncate(path, min(max(1, int(size * part)), max(0, size - 1)))

    return cut


def flipped(part: float) -> Fault:
    """One bit, at a part of its length; the time of change moves, as when a program wrote it."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        if data:
            data[min(int(len(data) * part), len(data) - 1)] ^= 0x10
        path.write_bytes(data)

    return flip


def unreadable(path: Path) -> None:
    path.chmod(0)


def a_folder(path: Path) -> None:
    missing(path)
    path.mkdir()
    (path / "something").write_bytes(b"in it")


def a_file(path: Path) -> None:
    missing(path)
    path.write_bytes(b"no folder")


KINDS: dict[str, list[Fault]] = {
    "missing": [missing],
    "empty": [empty],
    "truncated": [truncated(part) for part in (0, 0.25, 0.5, 0.9, 1)],
    "bit-flipped": [flipped(part / 16) for part in range(17)],
    "unreadable": [unreadable],
    "a folder": [a_folder],
}
FOLDER_KINDS: dict[str, list[Fault]] = {
    "missing": [missing],
    "unreadable": [unreadable],
    "a file": [a_file],
}


@dataclass(frozen=True)
class Row:
    """A line of the matrix: what is broken, where it is, and what a start may then do."""

    name: str
    path: str  # in the folder; a pattern whose first match is taken
    kinds: dict[str, list[Fault]]
    is_stopped: bool = False  # the server was stopped and not killed: the registry has no log


ROWS = [
    Row("registry.sqlite after a stop", "registry.sqlite", KINDS, is_stopped=True),
    Row("registry.sqlite after a kill", "registry.sqlite", KINDS),
    Row("registry.sqlite-wal", "registry.sqlite-wal", KINDS),
    Row("registry.sqlite-shm", "registry.sqlite-shm", KINDS),
    Row("registry.mark", "registry.mark", KINDS),
    Row("lock", "lock", KINDS),
    Row("a published file", "blobs/????????*", KINDS),
    Row("a file in incoming/", "blobs/incoming/half", KINDS),
    Row("a file in quarantine/", "blobs/quarantine/old", KINDS),
    Row("the folder blobs", "blobs", FOLDER_KINDS),
    Row("the folder incoming", "blobs/incoming", FOLDER_KINDS),
    Row("the folder quarantine", "blobs/quarantine", FOLDER_KINDS),
]
COLUMNS = [*KINDS, "a file"]
