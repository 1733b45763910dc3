"""Inventory: what is in the folder of published files, held against what the registry names.

Taking one changes nothing.
"""

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import Unreadable
from adapters.soundness import file_digest
from adapters.store import Blob, BlobStore, entries_of

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass
class Unnamed:
    """The store's files that no row of the registry names."""

    unacknowledged: list[Path] = field(default_factory=list)  # of uploads that a stop cut off
    unknown: list[Path] = field(default_factory=list)  # the registry has lost their rows
    foreign: list[Path] = field(default_factory=list)  # no adapter files, by name or kind


@dataclass
class Inventory:
    """All of the store's files. The dicts and the set are by digest."""

    unnamed: Unnamed
    damaged: dict[str, str] = field(default_factory=dict)  # what is wrong
    sound: set[str] = field(default_factory=set)
    unreadable: dict[str, str] = field(default_factory=dict)  # why it can't be read now


def unnamed_files(store: BlobStore, digests: Collection[str]) -> Unnamed:
    """`digests` are those of the registry's rows. Raises Unreadable for a folder.

    A folder that is not there has no files; on a disk without writes none is made. But where the
    registry names files, their folder is missing.
    """
    try:
        twins = _Twins(filter(_is_plain_file, entries_of(store.incoming_folder)))
        if digests:
            store.folder.stat()
        entries = [each for each in store.entries() if f"sha256:{each.name}" not in digests]
    except OSError as error:
        sentence = f"{error.filename} can't be read: {error.strerror}"
        raise Unreadable(sentence, retry_after_s=1) from error
    found = Unnamed()
    for entry in entries:
        if not (_DIGEST.fullmatch(entry.name) and _is_plain_file(entry)):
            found.foreign.append(entry)
        elif twins.has(entry):
            found.unacknowledged.append(entry)
        else:
            found.unknown.append(entry)
    return found


def take_inventory(
    store: BlobStore, known: Mapping[str, Blob], suspected: Collection[str]
) -> Inventory:
    """`known` are the registry's rows by digest, `suspected` the digests that it calls damaged.

    A file is hashed where its size or time of change are not those it was stored with, and where it
    is suspected. Raises Unreadable for a folder.
    """
    found = Inventory(unnamed_files(store, known))
    for digest, blob in known.items():
        _judge(store.path(digest), blob, digest in suspected, found)
    return found


def _judge(entry: Path, blob: Blob, is_suspected: bool, found: Inventory) -> None:
    try:
        status = entry.lstat()
        is_touched = is_suspected or status.st_mtime_ns != blob.mtime_ns
        if not stat.S_ISREG(status.st_mode):
            found.damaged[blob.digest] = "not a plain file"
        elif status.st_size != blob.bytes:
            found.damaged[blob.digest] = f"it has {status.st_size} bytes of {blob.bytes}"
        elif is_touched and file_digest(entry) != blob.digest:
            found.damaged[blob.digest] = "its bytes are not those of its digest"
        else:
            found.sound.add(blob.digest)
    except FileNotFoundError:
        found.damaged[blob.digest] = "it is gone"
    except OSError as error:
        found.unreadable[blob.digest] = error.strerror or str(error)


class _Twins:
    """Files of uploads under way: a published file has its twin among them until it is named."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stats = [(file, status) for file in files if (status := _status(file))]

    def has(self, entry: Path) -> bool:
        """Whether an upload's file is the same, or, in a copied folder, has the same bytes."""
        status = _status(entry)
        if status is None:
            return False
        same_size = [(f, s) for f, s in self._stats if s.st_size == status.st_size]
        if any(os.path.samestat(status, other) for _, other in same_size):
            return True
        return any(_digest(file) == f"sha256:{entry.name}" for file, _ in same_size)


def _is_plain_file(path: Path) -> bool:
    status = _status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _digest(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None
