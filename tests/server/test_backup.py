"""`trunkline backup` beside a running server, and `trunkline restore`: docs/operations.md."""

import itertools
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
from bad_files import set_bytes
from click.testing import CliRunner
from conftest import Serve, Served

from adapters import restore as restoring
from adapters.registry import Registry
from server.cli import main
from server.keys import new_key, read_keys, revoke_key
from server.keys_mark import lost_keys

OCTETS = {"content-type": "application/octet-stream"}
BODY = {"adapter": "only/here", "inputs": "abc"}


@dataclass(frozen=True)
class Site:
    """A server with a key, and its backups, taken while adapters came and went."""

    served: Served
    data: Path
    key: dict[str, str]
    answer: object
    folder: Path
    tar: Path


def trunkline(*arguments: str | Path) -> str:
    """Its output. Raises AssertionError, with the output, where it fails."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: str | Path) -> str:
    """The sentence of a command that does not do it."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 1, (done.output, done.exception)
    assert done.output.startswith("Error: ")
    assert done.output.count("\n") == 1
    return done.output


@contextmanager
def coming_and_going(client: httpx.Client) -> Iterator[list[int]]:
    """Uploads of new bytes and deletes of them, from a thread, until the block ends."""
    digest, stop = client.get("/info").json()["backbone"]["digest"], threading.Event()
    files = [set_bytes(digest, seed=seed) for seed in range(50, 54)]
    statuses: list[int] = []

    def move() -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            name = f"/adapters/passing-{turn % 3}"
            statuses.append(client.put(name, content=files[turn % 4], headers=OCTETS).status_code)
            statuses.append(client.delete(name).status_code)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def site(
    tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory, serve_for_session: Serve
) -> Site:
    place = tmp_path_factory.mktemp("site")
    data, folder, tar = place / "data", place / "backup", place / "backup.tar"
    scopes = frozenset({"infer", "admin"})
    _, secret = new_key(data / "keys.json", "ops", scopes=scopes)
    key = {"authorization": f"Bearer {secret}"}
    served = serve_for_session(tiny_backbone, "--data", data, "--dtype", "float32")
    with served.client(headers=key) as client:
        content = client.get("/adapters/full/file").content
        assert client.put("/adapters/only/here", content=content, headers=OCTETS).is_success
        answer = client.post("/encode", json=BODY).json()["data"]
        with coming_and_going(client) as statuses:
            while len(statuses) < 4:
                pass
            trunkline("backup", data, folder)
            assert "with keys.json" in trunkline("backup", data, tar)
    assert set(statuses) <= {200, 201, 202}
    return Site(served, data, key, answer, folder, tar)


def test_a_restored_server_serves_the_same_and_asks_for_the_same_keys(
    site: Site, tiny_backbone: Path, tmp_path: Path, serve: Serve
) -> None:
    data = tmp_path / "restored"
    assert "restored 1 trunk, " in trunkline("restore", site.tar, data)
    with serve(tiny_backbone, "--data", data, "--dtype", "float32").client() as client:
        assert client.post("/encode", json=BODY).status_code == 401
        after = client.post("/encode", json=BODY, headers=site.key)
        assert after.json()["data"] == site.answer
        for row in client.get("/adapters", headers=site.key).json()["data"]:
            verified = client.post(f"/adapters/{row['name']}/verify", headers=site.key)
            assert verified.json()["sound"]


def test_a_backup_is_its_owner_s_and_has_every_file_that_its_registry_names(site: Site) -> None:
    for path in (site.folder, *site.folder.rglob("*"), site.tar):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    (registry,) = site.folder.glob("*/registry.sqlite")
    with closing(sqlite3.connect(registry)) as database:
        rows = database.execute("SELECT DISTINCT digest FROM versions WHERE deleted_at IS NULL")
        live = {digest.removeprefix("sha256:") for (digest,) in rows}
    assert {path.name for path in registry.parent.glob("blobs/*")} >= live
    assert not [path for path in site.folder.parent.iterdir() if path.name.startswith(".")]


def test_a_damaged_or_cut_backup_is_refused_by_the_file_s_name_and_nothing_is_written(
    site: Site, tmp_path: Path
) -> None:
    copy, target = tmp_path / "copy", tmp_path / "target"
    shutil.copytree(site.folder, copy)
    for path in [path for path in sorted(copy.rglob("*")) if path.is_file()]:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damage in (bytes(flipped), whole[:-1], b"", None):
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            assert path.name in refused("restore", copy, target)
            assert not target.exists()
        path.write_bytes(whole)
    trunkline("restore", copy, target)


def test_a_cut_or_foreign_tar_file_is_refused(site: Site, tmp_path: Path) -> None:
    whole, cut, target = site.tar.read_bytes(), tmp_path / "cut.tar", tmp_path / "target"
    with tarfile.open(site.tar) as archive:
        manifest = archive.getmember("backup.json")
    end = manifest.offset_data + manifest.size  # behind it there are zeros alone
    for size in (0, 100, len(whole) // 3, len(whole) // 2, manifest.offset, end - 1):
        cut.write_bytes(whole[:size])
        assert str(cut) in refused("restore", cut, target)
        assert not target.exists()
    with tarfile.open(cut, "w") as archive:
        archive.add(Path(__file__), "keys.json")
    assert "backup.json is not in" in refused("restore", cut, target)


def test_a_folder_in_use_or_not_empty_is_refused_and_replace_deletes_nothing(
    site: Site, tmp_path: Path
) -> None:
    assert "a server uses" in refused("restore", site.folder, site.data, "--replace")
    target = tmp_path / "target"
    trunkline("restore", site.folder, target)
    (target / "keys.json").write_text("[]")
    assert "is not empty" in refused("restore", site.folder, target)
    assert (target / "keys.json").read_text() == "[]"
    trunkline("restore", site.folder, target, "--replace")
    (aside,) = target.glob("replaced-*")
    assert (aside / "keys.json").read_text() == "[]"
    assert list(aside.glob("*/registry.sqlite"))
    assert (target / "keys.json").read_bytes() == (site.folder / "keys.json").read_bytes()


def test_a_backup_replaces_nothing_and_a_damaged_file_has_to_be_left_out_by_name(
    site: Site, tmp_path: Path
) -> None:
    assert "exists already" in refused("backup", site.data, site.folder)
    data, out = tmp_path / "data", tmp_path / "out"
    assert "no trunk folder" in refused("backup", data, out)
    trunkline("restore", site.folder, data)
    blob = sorted(data.glob("*/blobs/*"))[0]
    blob.write_bytes(bytes(blob.stat().st_size))
    assert blob.name in refused("backup", data, out)
    assert not out.exists()
    assert blob.name in trunkline("backup", data, out, "--skip-damaged")
    assert blob.name not in {path.name for path in out.rglob("*")}
    trunkline("restore", out, tmp_path / "again")  # its manifest says that the file is left out


def test_a_backup_goes_on_with_a_new_snapshot_when_a_delete_took_a_file(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delete comes exactly between the snapshot and the copy."""
    from adapters import backup  # noqa: PLC0415

    data = tmp_path / "data"
    trunkline("restore", site.folder, data)
    (registry,) = data.glob("*/registry.sqlite")
    take = backup._snapshot
    taken = []

    def snapshot(source: Path, target: Path) -> dict[str, int]:
        live = take(source, target)
        taken.append(live)
        if len(taken) == 1:
            gone = min(live)
            with closing(sqlite3.connect(registry)) as database, database:
                deleted = "UPDATE versions SET deleted_at = 1 WHERE digest = ?"
                database.execute(deleted, (f"sha256:{gone}",))
            (registry.parent / "blobs" / gone).unlink()
        return live

    monkeypatch.setattr(backup, "_snapshot", snapshot)
    trunkline("backup", data, tmp_path / "out")
    assert len(taken) == 2
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert names >= set(taken[1])
    trunkline("restore", tmp_path / "out", tmp_path / "again")


def test_a_trunk_of_any_name_comes_back_and_one_without_its_registry_is_no_backup(
    tmp_path: Path,
) -> None:
    trunk = tmp_path / "data" / "my trunk \u00fc-0123"
    (trunk / "blobs").mkdir(parents=True)
    Registry(trunk / "registry.sqlite").close()
    for out in ("a.tar", "a"):
        trunkline("backup", tmp_path / "data", tmp_path / out)
        trunkline("restore", tmp_path / out, tmp_path / f"restored-{out}")
        assert (tmp_path / f"restored-{out}" / trunk.name / "registry.sqlite").is_file()
    lost = tmp_path / "data" / "lost" / "blobs"
    lost.mkdir(parents=True)
    (lost / ("0" * 64)).write_bytes(b"an adapter")
    assert "lost/registry.sqlite is missing" in refused(
        "backup", tmp_path / "data", tmp_path / "b.tar"
    )


def test_keys_alone_come_back_and_the_adapters_stay(site: Site, tmp_path: Path) -> None:
    data = tmp_path / "data"
    trunkline("restore", site.tar, data)
    keys, mark = data / "keys.json", data / "keys.mark"
    assert mark.exists()
    (registry,) = data.glob("*/registry.sqlite")
    before = registry.stat().st_ino
    keys.write_text("{")
    assert "restore --only-keys" in refused("backup", data, tmp_path / "broken")
    assert "are as they were" in trunkline("restore", "--only-keys", site.tar, data)
    assert keys.read_bytes() == (site.folder / "keys.json").read_bytes()
    (aside,) = data.glob("keys.json.replaced-*")
    assert aside.read_text() == "{"
    assert registry.stat().st_ino == before


def test_a_backup_without_lost_keys_restores_no_open_server(site: Site, tmp_path: Path) -> None:
    data, again = tmp_path / "data", tmp_path / "again"
    trunkline("restore", site.folder, data)
    (data / "keys.json").unlink()
    assert "does not start until it has keys" in trunkline("backup", data, tmp_path / "out")
    assert "does not start until it has keys" in trunkline("restore", tmp_path / "out", again)
    assert lost_keys(again / "keys.json") is not None


def test_a_key_that_was_revoked_after_the_backup_is_named(site: Site, tmp_path: Path) -> None:
    data = tmp_path / "data"
    trunkline("restore", site.folder, data)
    (key,) = read_keys(data / "keys.json")
    revoke_key(data / "keys.json", key.id)
    assert f"revoke {key.id}" in trunkline("restore", site.folder, data, "--replace")


def test_a_restore_that_is_cut_off_at_any_rename_opens_no_server_and_can_be_done_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, data = 0, tmp_path / "data"
    trunkline("restore", site.folder, data)
    renames = {name: getattr(os, name) for name in ("rename", "replace", "link")}
    while True:
        left = cut

        def unless_cut_off(name: str, *paths: Path) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            renames[name](*paths)

        with monkeypatch.context() as patched:
            for name in renames:
                patched.setattr(restoring.os, name, partial(unless_cut_off, name))
            done = CliRunner().invoke(main, ["restore", str(site.folder), str(data), "--replace"])
        if done.exit_code == 0:
            break
        assert "was cut off" in str(restoring.cut_off(data)), cut
        cut += 1
    assert cut > 2
    assert restoring.cut_off(data) is None
    assert (data / "keys.json").read_bytes() == (site.folder / "keys.json").read_bytes()


def test_neither_command_imports_torch() -> None:
    code = "import sys, server.cli.backup; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
