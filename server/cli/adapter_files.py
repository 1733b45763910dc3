"""Adapters on the disk of a client: in which form one is sent, and how one is written."""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import click

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
# Content types by a file's name; anything else is an adapter file
_ARCHIVES = {
    ".zip": "application/zip",
    ".tar": "application/x-tar",
    ".tar.gz": "application/gzip",
    ".tgz": "application/gzip",
}


def default_name(path: Path) -> str:
    """What an adapter is called when nobody says: the folder's name, or the file's stem."""
    name = path.resolve().name
    for suffix in (".safetensors", ".tar.gz", *_ARCHIVES):
        if not path.is_dir() and name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


@contextmanager
def sendable(path: Path) -> Iterator[tuple[Path, str]]:
    """The file to upload, and its content type; of a PEFT folder a zip of its two files."""
    if not path.is_dir():
        suffix = next((each for each in _ARCHIVES if path.name.endswith(each)), "")
        yield path, _ARCHIVES.get(suffix, "application/octet-stream")
        return
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (path / name).is_file():
            raise click.ClickException(
                f"{path} is no PEFT folder: {name} is missing; save the adapter with "
                "model.save_pretrained(folder), or push an adapter file"
            )
    with tempfile.TemporaryDirectory(prefix="trunkline-") as folder:
        archive = Path(folder) / "adapter.zip"
        _zip(path, archive)
        yield archive, "application/zip"


def _zip(folder: Path, archive: Path) -> None:
    try:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as zipped:
            for name in (CONFIG_FILE, TENSOR_FILE):
                zipped.write(folder / name, name)
    except OSError as error:
        raise click.ClickException(f"{error.filename} can't be read: {error.strerror}") from error


def sha256_of(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise click.ClickException(f"{file} can't be read: {error.strerror}") from error


@contextmanager
def new_file(path: Path, force: bool) -> Iterator[IO[bytes]]:
    """A file that is there when the block ends, whole and on the disk, or not at all.

    Raises ClickException for one that exists already, unless `force`.
    """
    if path.exists() and not force:
        raise click.ClickException(f"{path} exists already; --force replaces it")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(part, path, force)
    except OSError as error:
        raise click.ClickException(f"{path} can't be written: {error.strerror}") from error
    finally:
        with suppress(OSError):  # where it could not be made it can't be removed either
            part.unlink()


def _put_in_place(part: Path, path: Path, force: bool) -> None:
    """A link does not replace what another has written meanwhile."""
    if force:
        part.replace(path)
    else:
        os.link(part, path)
