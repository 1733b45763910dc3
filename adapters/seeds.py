"""Adapter files in a folder, by the names that their paths give them; unreadable ones too."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Seed:
    """A file below the folder. `name` is its path without the suffix, valid or not."""

    path: Path
    name: str
    fault: OSError | None = None  # of a folder that can't be listed: then path is the folder

    def read(self) -> bytes:
        """Raises OSError, also for what is no plain file: a pipe would be waited for for ever."""
        if self.fault is not None:
            raise self.fault
        if not self.path.is_file():
            self.path.stat()  # raises for a link to nothing
            raise OSError("it is not a plain file")
        return self.path.read_bytes()


@dataclass(frozen=True)
class Unusable:
    """A file that could not be published at the start, and why."""

    file: str  # its path in the folder
    name: str
    reason: str  # one word for a program: an Invalid's reason, else the error's code
    message: str


def seeds_in(folder: Path) -> Iterator[Seed]:
    """The adapter files below a folder, by path; links to folders are not followed."""
    faults: list[OSError] = []
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=faults.append):
        names = [name for name in (*files, *folders) if name.endswith(SUFFIX)]
        found += [Path(parent, name) for name in names]
    for fault in faults:
        path = Path(fault.filename or folder)
        yield Seed(path, path.relative_to(folder).as_posix(), fault)
    for path in sorted(found):
        yield Seed(path, path.relative_to(folder).as_posix().removesuffix(SUFFIX))


def printable(text: str) -> str:
    """A file name as text: bytes that are not UTF-8 are escaped."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")
