"""BAD_INPUTS, "Admin": a full disk and one that takes no writes; what is there is still served.

The disks are real and small, mounted for the test: they need the right to mount.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from adapter_client import Adapters, adapters_of, assert_refused
from conftest import Serve

from server.keys import new_key

KIB = 1024


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} is not permitted here: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def mounted(folder: Path, *arguments: str | Path) -> Iterator[Path]:
    """With the servers on it stopped by the caller before the block ends."""
    try:
        folder.mkdir()
        run("mount", *arguments, folder)
    except FileNotFoundError as error:
        pytest.skip(f"{error.filename} is not here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def serving(serve: Serve, backbone: Path, disk: Path) -> Iterator[Adapters]:
    served = serve(backbone, "--data", disk / "data", "--dtype", "float32")
    try:
        with adapters_of(served, disk / "data") as adapters:
            yield adapters
    finally:
        served.stop()


def leave_room(disk: Path, room: int) -> None:
    """Fill the disk but for so many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    status = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(max(0, status.f_bavail * status.f_frsize - room)))


def test_a_full_disk_refuses_and_the_old_version_serves(
    tiny_backbone: Path, serve: Serve, tmp_path: Path
) -> None:
    with (
        mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as disk,
        serving(serve, tiny_backbone, disk) as adapters,
    ):
        assert adapters.put("held", adapters.file(1)).status_code == 201
        answer, before = adapters.embeddings("held"), adapters.stored()
        # At every amount of room, so that each step of an upload is once the one that fails.
        for room in range(0, 512 * KIB, 8 * KIB):
            leave_room(disk, room)
            large = adapters.put("held", adapters.file(2, ranks=64))
            if large.status_code == 201:
                break
            assert_refused(large, 507, "storage_full")
            assert adapters.stored() == before
            assert adapters.embeddings("held") == answer
        assert room > len(adapters.file(2, ranks=64))
        assert adapters.versions("held")[-1]["version"] == large.json()["version"] == 2
        assert adapters.embeddings("held@1") == answer


def assert_says(adapters: Adapters, code: str, words: str) -> None:
    """/ready, /info and the log say what is off; the server takes traffic all the same."""
    ready = adapters.client.get("/ready")
    assert ready.status_code == 200
    storage = ready.json()["details"]["storage"]
    assert storage["code"] == code
    assert words in storage["message"]
    told = adapters.client.get("/info").json()["storage"]
    assert told["fault"] == storage
    assert not told["uploads"]
    assert storage["message"] in adapters.served.log.read_text()
    metrics = adapters.client.get("/metrics").text
    assert f'trunkline_storage_faults{{kind="{code}"}} 1.0' in metrics
    assert metrics.count("trunkline_storage_faults{") == 5


def test_a_full_disk_takes_deletes_and_a_start_on_it_or_without_writes_serves(
    tiny_backbone: Path, serve: Serve, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as disk:
        with serving(serve, tiny_backbone, disk) as adapters:
            for seed, name in enumerate(("held", "other", "kept")):
                assert adapters.put(name, adapters.file(seed + 1)).status_code == 201
            answer = adapters.embeddings("kept")
            leave_room(disk, 0)
            assert adapters.client.delete("/adapters/held").status_code == 200
            assert_refused(adapters.client.get("/adapters/held"), 404, "adapter_not_found")
        leave_room(disk, 0)
        with serving(serve, tiny_backbone, disk) as adapters:
            assert_says(adapters, "storage_full", "deletes work")
            assert adapters.embeddings("kept") == answer
            assert_refused(adapters.put("new", adapters.file(9)), 507, "storage_full")
            assert adapters.client.delete("/adapters/other").status_code == 200
        run("mount", "-o", "remount,ro", disk)
        with serving(serve, tiny_backbone, disk) as adapters:
            assert_says(adapters, "read_only", "restart the server when it does again")
            assert adapters.embeddings("kept") == answer
            client = adapters.client
            for refused in (
                adapters.put("new", adapters.file(9)),
                client.delete("/adapters/kept"),
                client.delete("/adapters/kept/versions/1"),
                client.put("/adapters/kept/aliases/stable", json={"version": 1}),
                client.post("/adapters/kept/pin"),
            ):
                assert_refused(refused, 503, "read_only")
            assert not adapters.versions("other")
        run("mount", "-o", "remount,rw", disk)
        (disk / "filler").unlink()
        with serving(serve, tiny_backbone, disk) as adapters:
            assert "details" not in adapters.client.get("/ready").json()
            assert adapters.put("new", adapters.file(9)).status_code == 201


def break_disk(disk: Path) -> None:
    """Have the kernel find a fault in a file system, which it then makes read-only."""
    device = os.stat(disk).st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    try:
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test")
    except OSError as error:
        pytest.skip(f"no file system can be made read-only here: {error}")
    with pytest.raises(OSError, match="Read-only"):
        (disk / "new").touch()


@contextmanager
def breakable_disk(folder: Path) -> Iterator[Path]:
    image = folder / "image"
    image.write_bytes(bytes(8 * KIB * KIB))
    run("mkfs.ext4", "-q", "-O", "^has_journal", image)
    with mounted(folder / "disk", "-o", "loop,errors=remount-ro", image) as disk:
        yield disk


def test_a_disk_that_becomes_read_only_refuses_writes_and_reads_go_on(
    tiny_backbone: Path, serve: Serve, tmp_path: Path
) -> None:
    with breakable_disk(tmp_path) as disk, serving(serve, tiny_backbone, disk) as adapters:
        for seed in (1, 2):
            assert adapters.put("held", adapters.file(seed)).status_code == 201
        adapters.put("cold", adapters.file(3))
        answers = {name: adapters.embeddings(name) for name in ("held", "held@1", "cold")}
        break_disk(disk)
        client = adapters.client
        with adapters.unchanged():
            for answer in (
                adapters.put("held", adapters.file(4)),
                adapters.put("held", adapters.file(2)),
                adapters.put("new", adapters.file(5)),
                client.put("/adapters/held/aliases/current", json={"version": 1}),
                client.delete("/adapters/held"),
                client.delete("/adapters/held/versions/1"),
            ):
                assert_refused(answer, 503, "read_only")
                assert int(answer.headers["retry-after"]) > 0
        assert client.post("/adapters/cold/unload").status_code == 200
        assert {name: adapters.embeddings(name) for name in answers} == answers
        assert client.get("/ready").status_code == 200
        assert client.post("/adapters/held/verify").json()["sound"]


def test_a_pin_that_cannot_be_stored_changes_nothing(
    tiny_backbone: Path, serve: Serve, tmp_path: Path
) -> None:
    with breakable_disk(tmp_path) as disk, serving(serve, tiny_backbone, disk) as adapters:
        assert adapters.client.post("/adapters/full/pin").status_code == 200
        break_disk(disk)
        assert_refused(adapters.client.post("/adapters/plain/pin"), 503, "read_only")
        assert_refused(adapters.client.post("/adapters/full/unpin"), 503, "read_only")
        assert not adapters.versions("plain")[0]["pinned"]
        assert adapters.versions("full")[0]["pinned"]


def test_bytes_that_are_stored_already_need_no_room_in_the_quota(
    tiny_backbone: Path, serve: Serve, tmp_path: Path
) -> None:
    empty = tmp_path / "none"
    empty.mkdir()
    size = (tiny_backbone / "adapters" / "plain.safetensors").stat().st_size
    options = ("--storage-quota", size * 3 // 2, "--data", tmp_path / "data", "--adapters", empty)
    served = serve(tiny_backbone, "--dtype", "float32", *options)
    with adapters_of(served, tmp_path / "data") as adapters:
        file = adapters.file(1)
        assert adapters.put("one", file).status_code == 201
        assert adapters.put("one", file).status_code == 200
        assert adapters.put("two", file).status_code == 201
        assert_refused(adapters.put("one", adapters.file(2)), 507, "storage_full")


def test_a_key_that_is_limited_to_adapters_leaves_room_in_the_quota(
    tiny_backbone: Path, serve: Serve, tmp_path: Path
) -> None:
    """One such key alone stores half of the quota, and another key's file has room then."""
    file, keys = tiny_backbone / "adapters" / "plain.safetensors", tmp_path / "keys.json"
    (tmp_path / "none").mkdir()
    secrets = {
        name: new_key(keys, name, scopes=frozenset({"infer", "admin"}), adapters=(f"{name}/*",))[1]
        for name in ("acme", "beta")
    }
    options = ("--storage-quota", file.stat().st_size * 6 + 100, "--keys", keys)
    served = serve(tiny_backbone, "--adapters", tmp_path / "none", "--data", tmp_path, *options)
    with served.client() as client:
        client.headers["x-api-key"] = secrets["acme"]
        digest = client.get("/info").json()["backbone"]["digest"]
        adapters = Adapters(served, client, tmp_path, digest)
        for seed in range(3):
            assert adapters.put(f"acme/{seed}", adapters.file(seed)).status_code == 201
        assert_refused(adapters.put("acme/3", adapters.file(3)), 507, "storage_full")
        assert adapters.put("acme/3", adapters.file(0)).status_code == 201  # no new bytes
        client.headers["x-api-key"] = secrets["beta"]
        assert adapters.put("beta/0", adapters.file(4)).status_code == 201
        client.headers["x-api-key"] = secrets["acme"]
        for seed in (1, 2):
            assert client.delete(f"/adapters/acme/{seed}").status_code == 200
        assert adapters.put("acme/4", adapters.file(5)).status_code == 201
