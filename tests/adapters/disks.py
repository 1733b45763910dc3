"""Small real disks for tests: mounted where this is permitted, else the test is skipped."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def mount(*arguments: str | Path) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs; whatever has files open on it is closed by the caller before the block ends."""
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def set_read_only(disk: Path, read_only: bool) -> None:
    mount("-o", f"remount,{'ro' if read_only else 'rw'}", disk)


def fill(disk: Path, room: int = 0) -> Path:
    """A file that leaves so many bytes free."""
    filler = disk / "filler"
    status = os.statvfs(disk)
    with filler.open("ab") as file:
        file.write(bytes(max(0, status.f_bavail * status.f_frsize - room)))
    return filler
