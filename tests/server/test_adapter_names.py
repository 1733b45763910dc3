"""BAD_INPUTS, "Names": none leads but to its own adapter, and damage to one stays there."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_client import OCTETS, Adapters, adapters_of, assert_refused, wait_until
from conftest import Serve
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import BadName
from adapters.names import NAME_PATTERN, ROUTE_WORDS, check_name

# As sent in the request line, over a socket: a client would mend some of them.
BAD_NAMES = [
    *(".", "..", "../..", "a/..", "../a", "a/../plain", "./plain", "plain/.", "a..b"),
    *("%2e", "%2e%2e", "%2E%2E", "..%2f..%2fetc%2fpasswd", "..%5c", "%252e%252e"),
    *("\\..\\", "%5c..%5c", "a\\b", "%00", "plain%00", "%00plain", "pl%00ain"),
    *("plain%0A", "plain%0a%0a", "plain%0D%0A", "plain%09", "plain%20", "%20plain", "+plain"),
    *("%D0%B0", "pl%D0%B0in", "%EF%BD%90lain", "pla%E2%80%8Bin", "%EF%BB%BFplain"),
    *("e%CC%81", "%D9%A1", "%F0%9F%92%A9", "%FF%FE", "%C0%AE%C0%AE", "%ED%A0%80"),
    *("a/b/c", "a%2fb%2fc", "/a", "//", "a//b", "/"),
    *("-a", ".a", "_a", "a/-b", "~", "a:b", "a,b", "a;b", "a*", "a%25", "a%3Fb", "a%23b"),
    *("a" * 65, "a" * 65 + "/b", "b/" + "a" * 65, "a" * 5000),
    *("", "base", "Fresh", "fresh/Name"),
    *(f"ns/{word}" for word in sorted(ROUTE_WORDS)),
]
GOOD_NAMES = [
    *("a" * 64, "a" * 64 + "/" + "b" * 64, "0", "a.b_c-d", "1.5", "x--", "a_", "a."),
    *("load", "versions", "versions/3", "aliases/stable", "base/one", "one/base", "ns/loads"),
]
BODIES = {
    "encode": '{"adapter": NAME, "inputs": "to be"}',
    "critic": '{"adapters": ["plain", NAME], "inputs": "to be"}',
}


@pytest.fixture(scope="module")
def adapters(
    tiny_backbone: Path, serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapters]:
    data = tmp_path_factory.mktemp("names")
    served = serve_for_session(tiny_backbone, "--data", data, "--dtype", "float32")
    with adapters_of(served, data) as adapters:
        yield adapters


def head(method: str, path: str, kind: str, length: int) -> bytes:
    line = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n"
    return f"{line}content-length: {length}\r\n\r\n".encode("ascii")


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: name[:40] or "empty")
def test_a_bad_name_is_refused_by_every_route(adapters: Adapters, name: str) -> None:
    file = adapters.file(21)
    octets, json = OCTETS["content-type"], "application/json"
    alias = b'{"version": 1}'
    with adapters.unchanged():
        requests = [
            head("PUT", f"/adapters/{name}", octets, len(file)) + file,
            *(
                head("GET", f"/adapters/{name}{rest}", octets, 0)
                for rest in ("", "/file", "/versions/1")
                if f"{name}{rest}" != "ns/file"  # the file of ns
            ),
            head("DELETE", f"/adapters/{name}", octets, 0),
            head("DELETE", f"/adapters/{name}/versions/1", octets, 0),
            head("PUT", f"/adapters/{name}/aliases/stable", json, len(alias)) + alias,
            *(
                head("POST", f"/adapters/{name}/{verb}", octets, 0)
                for verb in ("load", "unload", "pin", "unpin", "verify")
            ),
        ]
        if not name:
            del requests[1]  # GET /adapters/ is the list
        for request in requests:
            assert_refused(adapters.raw(request), 422, "validation_error")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "..",
            "\\u0000",
            "plain\\n",
            "pl\\u0430in",
            "\\uff50lain",
            "plain\\u200b",
            "a/b/c",
            "Plain",
        ),
        *("", "a" * 65, "plain@", "plain@@1", "plain@0", "plain@01", "plain@-1"),
        *("plain@Stable", "plain@sha256:", "plain@sha256:12345678901", "plain@sha256:" + "A" * 64),
        *(
            "plain@sha256:" + "a" * 65,
            "@1",
            "base@1",
            "plain@1\\n",
            "plain@..",
            "plain@" + "9" * 5000,
        ),
    ],
)
@pytest.mark.parametrize("route", BODIES)
def test_a_bad_reference_is_refused_by_inference(adapters: Adapters, route: str, name: str) -> None:
    with adapters.unchanged():
        body = BODIES[route].replace("NAME", f'"{name}"').encode()
        answer = adapters.client.post(
            f"/{route}", content=body, headers={"content-type": "application/json"}
        )
        assert_refused(answer, 422, "validation_error")


@pytest.mark.parametrize("name", GOOD_NAMES, ids=lambda name: name[:40])
def test_a_good_name_is_taken_as_it_is_and_reaches_its_own_adapter(
    adapters: Adapters, name: str
) -> None:
    answer = adapters.put(name, adapters.file(22 + GOOD_NAMES.index(name)))
    assert (answer.status_code, answer.json()["name"]) == (201, name)
    entry = {key: answer.json()[key] for key in ("name", "version", "digest")}
    for verb in ("load", "unload", "pin", "unpin"):
        done = adapters.client.post(f"/adapters/{name}/{verb}")
        assert done.status_code == 200, done.text
        assert {key: done.json()[key] for key in entry} == entry
    moved = adapters.client.put(f"/adapters/{name}/aliases/stable", json={"version": 1})
    assert (moved.status_code, moved.json()["name"]) == (200, name)
    encoded = adapters.client.post("/encode", json={"adapter": f"{name}@stable", "inputs": "a"})
    assert encoded.json()["data"][0]["adapter"] == entry
    digest = entry["digest"].removeprefix("sha256:")
    assert (adapters.blobs / digest).is_file()
    assert adapters.client.delete(f"/adapters/{name}/versions/1").status_code == 200
    assert adapters.client.delete(f"/adapters/{name}").status_code == 404


def test_nothing_is_stored_under_a_name(adapters: Adapters) -> None:
    assert adapters.put("findme/findme", adapters.file(40)).status_code == 201
    folder = re.compile(r"[0-9a-f]{64}|incoming|quarantine")
    assert all(folder.fullmatch(path.name) for path in adapters.blobs.iterdir())
    assert not list(adapters.data.rglob("*findme*"))


@pytest.mark.parametrize("name", ["Plain", "PLAIN", "plaiN", "Team/one", "team/ONE"])
def test_a_name_that_differs_by_case_only_is_a_conflict(adapters: Adapters, name: str) -> None:
    adapters.put("team/one", adapters.file(41))
    with adapters.unchanged():
        assert_refused(adapters.put(name, adapters.file(42)), 409, "name_conflict")


@pytest.mark.parametrize(
    "alias", ["1", "007", "Stable", "%2e%2e", "stable%0A", "a" * 65, "st%00", "-x", "%D0%B0", "a@b"]
)
def test_a_bad_alias_is_refused(adapters: Adapters, alias: str) -> None:
    body = b'{"version": 1}'
    path = f"/adapters/plain/aliases/{alias}"
    with adapters.unchanged():
        answer = adapters.raw(head("PUT", path, "application/json", len(body)) + body)
        assert_refused(answer, 422, "validation_error")


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.0", "1%0A", "01", "9" * 30, "%D9%A1"])
def test_a_bad_version_number_is_refused(adapters: Adapters, number: str) -> None:
    with adapters.unchanged():
        answer = adapters.raw(head("DELETE", f"/adapters/plain/versions/{number}", "x/y", 0))
        assert_refused(answer, 422, "validation_error")


def blob_of(adapters: Adapters, name: str) -> Path:
    digest = adapters.versions(name)[-1]["digest"]
    return adapters.blobs / digest.removeprefix("sha256:")


def flip_a_byte(path: Path) -> None:
    """As a disk would: the file's size and times stay."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_links_and_damaged_files_are_put_away_at_start_and_the_others_serve(
    tiny_backbone: Path, serve: Serve, tmp_path: Path
) -> None:
    data, outside = tmp_path / "data", tmp_path / "outside"
    arguments = (tiny_backbone, "--data", data, "--dtype", "float32")
    names = ("linked", "damaged", "cut", "gone", "folder", "sound")
    files = {}
    served = serve(*arguments)
    with adapters_of(served, data) as before:
        for seed, name in enumerate(names):
            files[name] = before.file(50 + seed)
            assert before.put(name, files[name]).status_code == 201
        blobs = {name: blob_of(before, name) for name in names}
        answers = {name: before.embeddings(name) for name in names}
    served.stop()

    blobs["linked"].rename(outside)
    blobs["linked"].symlink_to(outside)
    (blobs["linked"].parent / "stray").symlink_to(outside)
    (blobs["linked"].parent / "incoming" / "left-over").write_bytes(b"half an upload")
    damaged = bytearray(files["damaged"])
    damaged[-1] ^= 1
    blobs["damaged"].write_bytes(damaged)
    blobs["cut"].write_bytes(files["cut"][:-1])
    blobs["gone"].unlink()
    blobs["folder"].unlink()
    blobs["folder"].mkdir()

    with adapters_of(serve(*arguments), data) as after:
        put_away = {path.name.partition(".")[0] for path in (after.blobs / "quarantine").iterdir()}
        faulty = ("linked", "damaged", "cut", "folder")
        assert put_away == {"stray"}  # what is damaged stays where it is until it is read
        assert not list((after.blobs / "incoming").iterdir())
        assert outside.read_bytes() == files["linked"]
        for name in ("sound", "plain"):
            assert after.embeddings(name) == answers.get(name, after.embeddings(name))
        for name in (*faulty, "gone"):
            with after.unchanged():
                answer = after.client.post("/encode", json={"adapter": name, "inputs": "a"})
                assert_refused(answer, 404, "adapter_damaged")
                assert after.versions(name)[-1]["damaged"]
        for name in (*faulty, "gone"):
            mended = after.put(name, files[name])
            assert (mended.status_code, mended.json()["version"]) == (200, 1), mended.text
            assert not mended.json()["damaged"]
            assert after.embeddings(name) == answers[name]
            assert blobs[name].is_file()
            assert not blobs[name].is_symlink()
        assert outside.read_bytes() == files["linked"]


def test_a_file_damaged_behind_the_server_s_back_is_never_served(adapters: Adapters) -> None:
    file = adapters.file(60)
    assert adapters.put("decays", file).status_code == 201
    sound = adapters.embeddings("decays")
    assert adapters.client.post("/adapters/decays/unload").json()["resident"] is False
    flip_a_byte(blob_of(adapters, "decays"))
    verified = adapters.client.post("/adapters/decays/verify").json()
    assert verified["sound"] is False
    answer = adapters.client.post("/encode", json={"adapter": "decays", "inputs": "a"})
    assert_refused(answer, 404, "adapter_damaged")
    assert not blob_of(adapters, "decays").exists()
    adapters.embeddings("plain")
    assert adapters.put("decays", file).status_code == 200

    def serves() -> bool:
        again = adapters.client.post("/encode", json={"adapter": "decays", "inputs": "a"})
        return again.status_code == 200

    wait_until(serves)  # a load that failed is tried again a second later
    assert adapters.embeddings("decays") == sound


@given(st.text("a0._-/", max_size=9))
def test_the_documented_pattern_takes_the_names_that_are_taken(name: str) -> None:
    try:
        check_name(name)
    except BadName:
        assert not re.match(NAME_PATTERN, name)
    else:
        assert re.match(NAME_PATTERN, name)
