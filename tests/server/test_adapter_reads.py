"""Reading adapters: one version, the stored file, and lists that are sorted, searched and paged."""

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from adapter_client import Adapters, adapters_of, assert_refused
from conftest import Serve

from adapters.store import BlobStore
from server.guard import needed
from server.heads import Heads
from server.paths import routed
from server.stored_file import StoredFile


@pytest.fixture(scope="module")
def adapters(
    tiny_backbone: Path, serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapters]:
    """Names of different size, age and use, beside the backbone's own three."""
    data = tmp_path_factory.mktemp("reads")
    served = serve_for_session(tiny_backbone, "--data", data, "--dtype", "float32")
    with adapters_of(served, data) as adapters:
        for seed, (name, rank) in enumerate((("zeta", 1), ("team/alpha", 3), ("team/beta", 2))):
            assert adapters.put(name, adapters.file(seed, ranks=rank)).status_code == 201
        assert adapters.put("zeta", adapters.file(9, ranks=5), activate="false").status_code == 201
        alias = adapters.client.put("/adapters/zeta/aliases/golden", json={"version": 1})
        assert alias.status_code == 200
        for name in ("team/beta", "zeta", "team/beta"):
            adapters.embeddings(name)
        yield adapters


def listed(adapters: Adapters, **query: str) -> list[dict[str, Any]]:
    answer = adapters.client.get("/adapters", params=query)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


def names(adapters: Adapters, **query: str) -> list[str]:
    return [row["name"] for row in listed(adapters, **query)]


KEYS = {"created": "created_at", "bytes": "bytes", "requests": "requests", "used": "last_used"}


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("sort", ["name", *KEYS])
def test_a_list_is_in_order_and_its_pages_are_the_whole(
    adapters: Adapters, sort: str, order: str
) -> None:
    """Equal values stand by name; a page's cursor goes on exactly behind its last row."""
    whole = listed(adapters, sort=sort, order=order)
    key = KEYS.get(sort, "name")
    expected = sorted(whole, key=lambda r: (r[key] or 0, r["name"]), reverse=order == "desc")
    assert whole == expected
    assert len(whole) == 6
    for limit in (1, 2, 4, 6):
        found: list[str] = []
        after: str | None = ""
        while after is not None:
            query = {"sort": sort, "order": order, "limit": str(limit), "after": after}
            page = adapters.client.get("/adapters", params=query).json()
            found += [row["name"] for row in page["data"]]
            after = page["next"]
        assert found == [row["name"] for row in whole]


def test_use_and_size_are_those_of_the_rows(adapters: Adapters) -> None:
    assert names(adapters, sort="requests", order="desc")[:2] == ["team/beta", "zeta"]
    assert names(adapters, sort="used", order="desc")[:2] == ["team/beta", "zeta"]
    assert names(adapters, sort="created", order="desc")[:3] == ["team/beta", "team/alpha", "zeta"]
    # zeta's larger version is not current, so its size does not count
    assert names(adapters, sort="bytes", q="e")[0] == "zeta"


def test_q_is_part_of_a_name_or_of_an_alias(adapters: Adapters) -> None:
    assert names(adapters, q="eta") == ["team/beta", "zeta"]
    assert names(adapters, q="TEAM/") == ["team/alpha", "team/beta"]
    assert names(adapters, q="gold") == ["zeta"]
    assert names(adapters, q="curr") == []  # every name's own pointer is no alias of its own
    assert names(adapters, q="te*") == names(adapters, q="%") == names(adapters, q="_") == []
    assert names(adapters, q="eta", sort="bytes", order="desc", limit="1") == ["team/beta"]


def test_a_name_is_a_cursor_of_the_list_by_name(adapters: Adapters) -> None:
    assert names(adapters, after="team/alpha") == ["team/beta", "zeta"]
    assert names(adapters, after="u") == ["zeta"]
    assert names(adapters, after="team/beta", order="desc")[0] == "team/alpha"


def test_a_query_is_strict(adapters: Adapters) -> None:
    cursor = adapters.client.get("/adapters", params={"sort": "bytes", "limit": 1}).json()["next"]
    faults = {
        "sort=size": "sort must be one of name, created",
        "order=up": "order must be one of asc, desc",
        "limit=0": "limit must be a number from 1 to 1000",
        "limit=1&limit=2": "limit is given twice",
        "offset=3": "unknown query parameter offset",
        "%3Cscript%3E=1": "unknown query parameter;",
        f"q={'a' * 201}": "q may have 200 characters",
        "sort=bytes&after=zeta": "after is not a cursor",
        f"sort=created&after={cursor}": "after is not a cursor",
        f"sort=bytes&order=desc&after={cursor}": "after is not a cursor",
        "sort=bytes&after=~": "after is not a cursor",
        "sort=bytes&after=~WyJieXRlcyIsZmFsc2UsMSwiXHVkODAwIl0=": "after is not a cursor",
        "sort=bytes&after=~%C3%A9": "after is not a cursor",
        "sort=bytes&after=~WyJieXRlcyIsZmFsc2UsIngiLCJ5Il0=": "after is not a cursor",
        "sort=bytes&after=~WyJieXRlcyIsZmFsc2UsMWUzMDksInkiXQ==": "after is not a cursor",
    }
    for query, sentence in faults.items():
        answer = adapters.client.get(f"/adapters?{query}")
        assert_refused(answer, 422, "validation_error")
        assert sentence in answer.json()["error"]["message"], query
    with adapters.unchanged():
        typo = adapters.put("plain", adapters.file(1), activte="false")
        assert_refused(typo, 422, "validation_error")
        assert "activte" in typo.json()["error"]["message"]


def test_one_version_is_read(adapters: Adapters) -> None:
    whole = adapters.client.get("/adapters/zeta").json()
    for version in whole["versions"]:
        answer = adapters.client.get(f"/adapters/zeta/versions/{version['version']}")
        assert answer.json() == {"name": "zeta"} | version
        assert answer.headers["etag"] == f'"{version["version"]}"'
    for path, status, reason in (
        ("zeta/versions/9", 404, "version_not_found"),
        ("nothing/versions/1", 404, "adapter_not_found"),
        ("zeta/versions/0", 422, "validation_error"),
        ("zeta/versions/x", 422, "validation_error"),
    ):
        assert_refused(adapters.client.get(f"/adapters/{path}"), status, reason)


def test_the_file_of_every_kind_of_reference_is_what_was_uploaded(adapters: Adapters) -> None:
    first, second = adapters.file(0, ranks=1), adapters.file(9, ranks=5)
    digest = adapters.versions("zeta")[1]["digest"]
    for reference, file, number in (
        ("zeta", first, 1),
        ("zeta@2", second, 2),
        ("zeta@golden", first, 1),
        (f"zeta@{digest[:19]}", second, 2),
    ):
        answer = adapters.client.get(f"/adapters/{reference}/file")
        assert (answer.status_code, answer.content) == (200, file)
        assert answer.headers["x-trunkline-adapter"] == f"zeta@{number}"
    for path, status, reason in (
        ("zeta@9/file", 404, "version_not_found"),
        ("nothing/file", 404, "adapter_not_found"),
        ("a/b/c/file", 422, "validation_error"),
    ):
        assert_refused(adapters.client.get(f"/adapters/{path}"), status, reason)


def test_a_damaged_file_is_never_sent_whole(adapters: Adapters) -> None:
    file = adapters.file(60)
    digest = adapters.put("rotten", file).json()["digest"].removeprefix("sha256:")
    blob = adapters.blobs / digest
    blob.write_bytes(file[:-1] + bytes([file[-1] ^ 1]))
    with pytest.raises(httpx.RemoteProtocolError):
        adapters.client.get("/adapters/rotten/file")
    blob.unlink()
    assert_refused(adapters.client.get("/adapters/rotten/file"), 404, "adapter_damaged")
    assert adapters.client.delete("/adapters/rotten").status_code == 200


def test_a_download_that_has_begun_outlives_a_delete(adapters: Adapters) -> None:
    file = adapters.file(61, ranks=64)
    adapters.put("leaving", file)
    with adapters.client.stream("GET", "/adapters/leaving/file") as answer:
        assert adapters.client.delete("/adapters/leaving").status_code == 200
        assert answer.read() == file


def test_head_reads_no_byte_of_the_file(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest = f"sha256:{hashlib.sha256(b'weights').hexdigest()}"
    store.path(digest).write_bytes(b"weights")
    version = SimpleNamespace(name="x", number=3, digest=digest, bytes=7)
    sent: list[dict[str, Any]] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await StoredFile(store, version, ExitStack())(scope, receive, send)

    async def send(message: Any) -> None:
        sent.append(message)

    for method, body in (("GET", b"weights"), ("HEAD", b"")):
        sent.clear()
        asyncio.run(Heads(answer)({"type": "http", "method": method}, None, send))
        assert b"".join(message.get("body", b"") for message in sent) == body
        assert (b"content-length", b"7") in sent[0]["headers"]


@pytest.mark.parametrize("word", ["file", "traffic"])
def test_new_routes_are_no_names(adapters: Adapters, word: str) -> None:
    with adapters.unchanged():
        refused = adapters.put(f"acme/{word}", adapters.file(1))
        assert_refused(refused, 422, "validation_error")


def test_a_file_is_an_admins() -> None:
    for path in ("/adapters/x/file", "/adapters/team/x@3/file", "/adapters/x/file/"):
        assert needed("GET", routed(path)) == {"admin"}  # HEAD is a GET here: server/heads.py
    assert needed("GET", "/adapters/x") == {"infer", "admin"}
    assert needed("GET", "/adapters/file") == {"infer", "admin"}
