"""A library on a full disk, and on a folder that takes no writes: deletes work on the first, and
both serve what is there, at a start too."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from conftest import TINY, random_adapter
from disks import fill, set_read_only, small_disk
from faulty_child import open_library

from adapters.errors import Damaged, InUse, ReadOnly, StorageFull, Unreadable
from adapters.format import adapter_bytes
from adapters.library import Library, Upload
from adapters.reserve import RESERVE_BYTES
from model.checkpoint import read_backbone
from server.observed import storage_faults

NO_FAULTS = dict.fromkeys(("damaged", "unusable", "quarantined", "read_only", "storage_full"), 0)


@pytest.fixture(scope="module")
def files(tiny_backbone: Path) -> list[bytes]:
    metadata = {"lora_alpha": "8.0", "base_digest": read_backbone(tiny_backbone).digest}
    return [adapter_bytes(random_adapter(TINY, 900 + seed), metadata) for seed in range(4)]


def put(library: Library, name: str, file: bytes) -> None:
    incoming = library.store.incoming()
    try:
        incoming.write(file)
        library.publish(Upload(name, "test"), incoming)
    finally:
        incoming.discard()


def names(library: Library) -> dict[str, list[int]]:
    return {n.name: [v.number for v in n.versions] for n in library.registry.page()}


def blob_count(library: Library) -> int:
    return sum(path.is_file() for path in library.store.folder.iterdir())


def test_deletes_work_on_a_full_disk_which_takes_uploads_again_when_it_has_room(
    tiny_backbone: Path, tmp_path: Path, files: list[bytes]
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        library = open_library(disk / "data", tiny_backbone, reserve_bytes=RESERVE_BYTES)
        with closing(library):
            assert library.reserve.whole
            for number in range(60):  # a tombstone a version: more than is left of a page
                put(library, "a", files[number % 2])
            put(library, "b", files[2])
            library.pin("b", "test")
            filler = fill(disk)
            with pytest.raises(StorageFull):
                put(library, "c", files[3])
            assert library.remove("a", None, "test") == 0
            library.unpin("b", "test")
            assert names(library) == {"b": [1]}
            assert blob_count(library) == 1
            library.disk.look()
            if not library.reserve.whole:  # uploads may not take what deletes need
                with pytest.raises(StorageFull):
                    put(library, "c", files[3])
                assert library.disk.fault
                assert library.disk.fault.code == "storage_full"
            filler.unlink()
            library.disk.look()
            assert library.reserve.whole
            assert library.disk.fault is None
            put(library, "c", files[3])


def test_a_start_on_a_full_disk_serves_what_is_there_and_deletes(
    tiny_backbone: Path, tmp_path: Path, files: list[bytes]
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        with closing(open_library(disk / "data", tiny_backbone, reserve_bytes=RESERVE_BYTES)) as it:
            put(it, "a", files[0])
            put(it, "b", files[1])
        fill(disk)
        with closing(open_library(disk / "data", tiny_backbone, reserve_bytes=RESERVE_BYTES)) as it:
            assert it.load("a", 30)[1]
            with pytest.raises(StorageFull):
                put(it, "c", files[2])
            assert it.remove("b", None, "test") == 0
            assert names(it) == {"a": [1]}
            assert it.disk.fault
            assert it.disk.fault.code == "storage_full"


def left_by_a_kill(folder: Path, backbone: Path, files: list[bytes], tmp_path: Path) -> None:
    """A data folder whose registry is in the write-ahead log yet, as a kill would leave it."""
    with closing(open_library(tmp_path / "living", backbone)) as library:
        for file in files[:3]:
            put(library, "a", file)
        library.remove("a", 1, "test")
        shutil.copytree(tmp_path / "living", folder)
    assert (folder / "registry.sqlite-wal").stat().st_size > 0


def every_file(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
    }


def assert_serves_without_writes(folder: Path, backbone: Path, file: bytes) -> None:
    """Also what is in the write-ahead log alone."""
    before = every_file(folder)
    with closing(open_library(folder, backbone, reserve_bytes=RESERVE_BYTES)) as library:
        assert names(library) == {"a": [2, 3]}
        assert library.load("a@2", 30)[1]
        assert library.disk.fault
        assert library.disk.fault.code == "read_only"
        assert storage_faults(library) == NO_FAULTS | {"read_only": 1}
        for write in (
            lambda: put(library, "c", file),
            lambda: library.remove("a", None, "test"),
            lambda: library.remove("a", 2, "test"),
            lambda: library.registry.point("a", "stable", 2, "test"),
            lambda: library.pin("a", "test"),
        ):
            with pytest.raises(ReadOnly):
                write()
        assert names(library) == {"a": [2, 3]}
        with closing(open_library(folder, backbone)) as second:  # a shared lock
            assert names(second) == {"a": [2, 3]}
    assert every_file(folder) == before


def test_a_start_on_a_read_only_disk_serves_the_log_s_transactions_too(
    tiny_backbone: Path, tmp_path: Path, files: list[bytes]
) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        folder = disk / "data"
        left_by_a_kill(folder, tiny_backbone, files, tmp_path)
        set_read_only(disk, True)
        assert_serves_without_writes(folder, tiny_backbone, files[3])
        with closing(open_library(folder, tiny_backbone)):
            set_read_only(disk, False)
            with pytest.raises(InUse):  # the reader's lock keeps a writer out
                open_library(folder, tiny_backbone)
        with closing(open_library(folder, tiny_backbone)) as library:
            put(library, "c", files[3])
            assert names(library) == {"a": [2, 3], "c": [1]}


def test_a_start_on_a_disk_that_is_read_only_and_empty_serves_the_trunk(
    tiny_backbone: Path, tmp_path: Path, files: list[bytes]
) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        set_read_only(disk, True)
        with closing(open_library(disk / "data", tiny_backbone)) as library:
            assert names(library) == {}
            with pytest.raises(ReadOnly):
                put(library, "c", files[3])
        with pytest.raises(ReadOnly, match="can't be made"):
            open_library(disk / "none" / "at all", tiny_backbone)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom permissions apply."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_start_without_permission_to_write_serves_what_is_there(
    tiny_backbone: Path, tmp_path: Path, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = read_backbone(tiny_backbone)  # the other user may not
    monkeypatch.setattr("faulty_child.read_backbone", lambda _: backbone)
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place) / "data"
        left_by_a_kill(folder, tiny_backbone, files, tmp_path)
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        try:
            for each in folders:
                each.chmod(0o555)
            with unprivileged(), tempfile.TemporaryDirectory() as temporary:
                monkeypatch.setattr(tempfile, "tempdir", temporary)
                assert_serves_without_writes(folder, tiny_backbone, files[3])
                monkeypatch.undo()
        finally:
            for each in folders:
                each.chmod(0o755)


def test_damage_is_cleared_when_the_file_is_sound_again(
    tiny_backbone: Path, tmp_path: Path, files: list[bytes]
) -> None:
    folder = tmp_path / "data"
    with closing(open_library(folder, tiny_backbone)) as library:
        put(library, "a", files[0])
        digest = library.version("a").digest
        path, sound = library.store.path(digest), library.store.path(digest).read_bytes()
        path.unlink()
        with pytest.raises(Damaged):
            library.load("a", 30)
        with pytest.raises(Damaged):
            library.version("a")
        path.write_bytes(sound)
        assert library.verify(digest) is None
        assert library.load("a", 30)[1]
        library.slots.evict(digest)
        path.write_bytes(bytes(len(sound)))
        with pytest.raises(Damaged):
            library.load("a", 30)
        path.write_bytes(sound)
    with closing(open_library(folder, tiny_backbone)) as library:
        assert library.load("a", 30)[1]


def test_a_missing_folder_of_files_is_a_missing_disk_and_no_damage(
    tiny_backbone: Path, tmp_path: Path, files: list[bytes]
) -> None:
    with closing(open_library(tmp_path / "data", tiny_backbone)) as library:
        put(library, "a", files[0])
        library.store.folder.rename(tmp_path / "away")
        with pytest.raises(Unreadable):
            library.load("a", 30)
        (tmp_path / "away").rename(library.store.folder)
        library.slots.forgive(library.version("a").digest)
        assert library.load("a", 30)[1]
