"""The backup of docs/operations.md: a restored server serves the same adapters and is not open."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from conftest import Serve

from server.keys import new_key


def back_up(data: Path, to: Path) -> None:
    """The documented steps, in their order, beside a running server."""
    shutil.copy(data / "keys.json", to / "keys.json")
    (database,) = data.glob("*/registry.sqlite")
    folder = to / database.parent.name
    folder.mkdir()
    with (
        closing(sqlite3.connect(database)) as source,
        closing(sqlite3.connect(folder / "registry.sqlite")) as copy,
    ):
        source.backup(copy)
    shutil.copytree(database.parent / "blobs", folder / "blobs")


def test_a_restored_backup_serves_the_same_and_asks_for_the_same_keys(
    tiny_backbone: Path, tmp_path: Path, serve: Serve
) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    data.mkdir()
    copy.mkdir()
    scopes = frozenset({"infer", "admin"})
    _, secret = new_key(data / "keys.json", "ops", scopes=scopes)
    key = {"authorization": f"Bearer {secret}"}
    body = {"adapter": "only/here", "inputs": "abc"}
    with serve(tiny_backbone, "--data", data).client(headers=key) as client:
        content = client.get("/adapters/full/file").content
        kind = {"content-type": "application/octet-stream"}
        put = client.put("/adapters/only/here", content=content, headers=kind)
        assert put.status_code == 201
        before = client.post("/encode", json=body).json()["data"]
        back_up(data, copy)
    with serve(tiny_backbone, "--data", copy).client() as client:
        assert client.post("/encode", json=body).status_code == 401
        after = client.post("/encode", json=body, headers=key)
        assert after.status_code == 200
        assert after.json()["data"] == before
