"""Adapter files of a folder at a server's start: each is published, or named with its reason."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_adapter, random_gpt, tiny_tokenizer

from adapters.errors import StorageFull
from adapters.format import adapter_bytes
from adapters.library import Library
from adapters.names import ROUTE_WORDS
from adapters.seeds import Seed
from adapters.slots import SlotPool
from model.checkpoint import Backbone, backbone_digest, backbone_tensors
from model.encoder import Encoder


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    tensors = backbone_tensors(TINY, random_gpt(TINY).state_dict())
    return Backbone("tiny", TINY, tensors, tiny_tokenizer(), None, backbone_digest(TINY, tensors))


@pytest.fixture
def library(backbone: Backbone, tmp_path: Path) -> Iterator[Library]:
    encoder = Encoder(TINY, backbone.tensors)
    library = Library(
        tmp_path / "data",
        backbone,
        encoder,
        lambda read: SlotPool(
            TINY, torch.float32, encoder.device, capacity_bytes=1 << 20, max_slots=0, read=read
        ),
    )
    yield library
    library.close()


@pytest.fixture
def folder(tmp_path: Path, sound: bytes) -> Path:
    """One sound file, beside which the tests put others."""
    path = tmp_path / "adapters"
    path.mkdir()
    (path / "zz-sound.safetensors").write_bytes(sound)
    return path


@pytest.fixture(scope="module")
def sound(backbone: Backbone) -> bytes:
    return file_of(backbone)


def file_of(backbone: Backbone, seed: int = 0, scale: float = 1.0, **metadata: str) -> bytes:
    tensors = {name: tensor * scale for name, tensor in random_adapter(TINY, seed).items()}
    fields = {"lora_alpha": "8.0", "base_digest": backbone.digest} | metadata
    return adapter_bytes(tensors, fields)


def published(library: Library) -> list[str]:
    return [named.name for named in library.registry.page()]


def reasons(library: Library) -> dict[str, str]:
    return {each.file: each.reason for each in library.unusable}


def test_each_bad_file_is_named_with_its_reason_and_the_others_are_served(
    library: Library,
    folder: Path,
    backbone: Backbone,
    sound: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (folder / "empty.safetensors").touch()
    (folder / "text.safetensors").write_text("no tensors here")
    (folder / "other.safetensors").write_bytes(file_of(backbone, base_digest="sha256:" + "0" * 64))
    (folder / "still.safetensors").write_bytes(file_of(backbone, scale=0.0))
    (folder / "nan.safetensors").write_bytes(file_of(backbone, scale=float("nan")))
    (folder / "folder.safetensors").mkdir()
    (folder / "ZZ-Sound.safetensors").write_bytes(sound)
    (folder / "two words.safetensors").write_bytes(sound)
    (folder / "base.safetensors").write_bytes(sound)
    (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "deep.safetensors").write_bytes(sound)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.safetensors")).write_bytes(sound)
    library.seed(folder)
    assert published(library) == ["zz-sound"]
    assert reasons(library) == {
        "empty.safetensors": "truncated",
        "text.safetensors": "not_safetensors",
        "other.safetensors": "base_digest",
        "still.safetensors": "adapter_has_no_effect",
        "nan.safetensors": "not_finite",
        "folder.safetensors": "unreadable",
        "ZZ-Sound.safetensors": "validation_error",
        "two words.safetensors": "validation_error",
        "base.safetensors": "validation_error",
        "dangling.safetensors": "unreadable",
        "pipe.safetensors": "unreadable",
        "a/b/deep.safetensors": "validation_error",
        "\\xff.safetensors": "validation_error",
    }
    assert all(each.message for each in library.unusable)
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == len(library.unusable)
    for each, line in zip(library.unusable, logged, strict=True):
        assert each.file in line
        assert each.reason in line


def test_links_to_files_are_followed_as_kubernetes_mounts_them(
    library: Library, folder: Path, sound: bytes, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").write_bytes(sound)
    (folder / "linked.safetensors").symlink_to(tmp_path / "elsewhere")
    library.seed(folder)
    assert published(library) == ["linked", "zz-sound"]
    assert library.unusable == []


def test_a_name_of_before_that_is_now_a_route_is_named_although_it_is_registered(
    library: Library, folder: Path, sound: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "acme").mkdir()
    (folder / "acme" / "stats.safetensors").write_bytes(sound)
    library.seed(folder)
    assert published(library) == ["acme/stats", "zz-sound"]
    monkeypatch.setattr("adapters.names.ROUTE_WORDS", ROUTE_WORDS | {"stats"})
    library.seed(folder)
    assert reasons(library) == {"acme/stats.safetensors": "validation_error"}


def fails_for(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Seed.read

    def read_or_fail(seed: Seed) -> bytes:
        if seed.name == name:
            raise error
        return read(seed)

    monkeypatch.setattr(Seed, "read", read_or_fail)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_disk_error_at_one_file_is_of_that_file_alone_and_the_next_start_tries_again(
    library: Library,
    folder: Path,
    sound: bytes,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "ill.safetensors").write_bytes(sound)
    with monkeypatch.context() as patch:
        fails_for("ill", OSError(number, os.strerror(number)), patch)
        library.seed(folder)
    assert published(library) == ["zz-sound"]
    assert [(each.reason, each.message) for each in library.unusable] == [
        ("unreadable", os.strerror(number))
    ]
    library.seed(folder)
    assert published(library) == ["ill", "zz-sound"]
    assert library.unusable == []


def test_a_full_disk_keeps_no_server_from_its_start(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise StorageFull("the disk is full; nothing was stored")

    monkeypatch.setattr(library.store, "incoming", full)
    library.seed(folder)
    assert reasons(library) == {"zz-sound.safetensors": "storage_full"}


def test_a_folder_that_can_t_be_listed_is_named(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut = folder / "shut"
    shut.mkdir()
    walk = os.walk

    def refuse(top: Path, onerror):  # what os.walk does where listing fails, also for root
        onerror(PermissionError(errno.EACCES, "Permission denied", str(shut)))
        yield from walk(top)

    monkeypatch.setattr("adapters.seeds.os.walk", refuse)
    library.seed(folder)
    assert published(library) == ["zz-sound"]
    assert reasons(library) == {"shut": "unreadable"}
