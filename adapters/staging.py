"""Files and folders that are written whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.errors import ImportRefused
from model.checkpoint import CONFIG_FILE


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to be filled; it becomes `out` when all of it is written.

    Where `out` has files of its own the new ones are moved beside them, config.json last. After
    an error nothing of it is left, not even the folders above `out` that were made for it.
    """
    out = out.resolve()
    made = [path for path in out.parents if not path.exists()]  # the deepest first
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if (out / CONFIG_FILE).exists():
            raise ImportRefused(f"{out} was made meanwhile by another import: run this one again")
        if out.exists() and any(out.iterdir()):
            _move_into(folder, out)
        else:
            os.rename(folder, out)  # in place of an empty folder too
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # it is not empty: `out` is in it
                path.rmdir()


def _move_into(folder: Path, out: Path) -> None:
    """Move the files of one folder into another; an error takes back those that were moved."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files.sort(key=lambda path: path.name == CONFIG_FILE)
    targets = [out / path.relative_to(folder) for path in files]
    new = [target for target in targets if not target.exists()]
    folders = {target.parent for target in new if not target.parent.exists()}
    try:
        for path, target in zip(files, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    except OSError:
        for target in new:
            target.unlink(missing_ok=True)
        for parent in folders:
            with suppress(OSError):
                parent.rmdir()
        raise
