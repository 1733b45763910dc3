"""The vLLM-shaped pair: names from one folder, and nothing from outside of it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_client import MAX_ERROR_BYTES, Adapters, adapters_of, long_request
from conftest import Serve

CAP = 1 << 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from, beside a secret."""
    outside = tmp_path_factory.mktemp("import")
    (outside / "root" / "folder").mkdir(parents=True)
    return outside / "root"


@pytest.fixture(scope="module")
def adapters(
    root: Path, tiny_backbone: Path, serve_for_session: Serve, tmp_path_factory
) -> Iterator[Adapters]:
    data = tmp_path_factory.mktemp("vllm")
    served = serve_for_session(
        *(tiny_backbone, "--data", data, "--dtype", "float32", "--import-root", root),
        *("--max-batch-tokens", "64", "--max-adapter-bytes", str(CAP)),
    )
    with adapters_of(served, data) as adapters:
        (root.parent / "secret.safetensors").write_bytes(adapters.file(1))
        (root / "good.safetensors").write_bytes(adapters.file(2))
        (root / "folder" / "only.safetensors").write_bytes(adapters.file(3))
        yield adapters


def load(adapters: Adapters, name: str, path: str | Path, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path)} | more
    return adapters.client.post("/v1/load_lora_adapter", json=body)


def unload(adapters: Adapters, name: str) -> httpx.Response:
    return adapters.client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def assert_refused(answer: httpx.Response, status: int, code: str) -> None:
    """In OpenAI's shape."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) <= MAX_ERROR_BYTES


def test_a_file_of_the_root_is_loaded_and_unloaded(adapters: Adapters, root: Path) -> None:
    loaded = load(adapters, "good", "good.safetensors")
    assert loaded.status_code == 200, loaded.text
    digest = adapters.versions("good")[0]["digest"]
    assert loaded.json() == {"status": "success", "name": "good", "version": 1, "digest": digest}
    adapters.embeddings("good")
    done = unload(adapters, "good")
    assert (done.status_code, done.json()) == (200, {"status": "success", "in_flight": 0})
    assert_refused(unload(adapters, "good"), 404, "adapter_not_found")
    assert (root / "good.safetensors").is_file()


@pytest.mark.parametrize("path", ["folder", "./folder/", "folder/../folder/only.safetensors"])
def test_a_folder_stands_for_its_one_file(adapters: Adapters, path: str) -> None:
    assert load(adapters, "by-folder", path).status_code == 200
    assert unload(adapters, "by-folder").status_code == 200


def test_an_absolute_path_below_the_root_is_as_good(adapters: Adapters, root: Path) -> None:
    assert load(adapters, "absolute", root / "good.safetensors").status_code == 200
    assert unload(adapters, "absolute").status_code == 200


def test_a_taken_name_needs_load_inplace(adapters: Adapters) -> None:
    first = load(adapters, "inplace", "good.safetensors").json()
    with adapters.unchanged():
        assert_refused(load(adapters, "inplace", "folder"), 400, "validation_error")
    second = load(adapters, "inplace", "folder", load_inplace=True).json()
    assert (first["version"], second["version"]) == (1, 2)
    again = load(adapters, "inplace", "folder", load_inplace=True)
    assert (again.status_code, again.json()) == (200, second)
    assert load(adapters, "inplace-new", "good.safetensors", load_inplace=True).status_code == 200


@pytest.mark.parametrize("name", ["<script>", "../x", "x" * 5000, ""])
def test_unload_never_repeats_what_is_no_name(adapters: Adapters, name: str) -> None:
    refused = unload(adapters, name)
    assert_refused(refused, 400, "validation_error")
    assert len(refused.content) < 300
    assert not name or name not in refused.text


def test_unload_drains(adapters: Adapters) -> None:
    load(adapters, "busy", "good.safetensors")
    with long_request(adapters, "busy") as admitted:
        done = unload(adapters, "busy")
        assert (done.status_code, done.json()["in_flight"]) == (202, 1)
        assert_refused(unload(adapters, "busy"), 404, "adapter_not_found")
        assert admitted.result().status_code == 200


OUTSIDE = [
    *("..", "../", "../secret.safetensors", "folder/../../secret.safetensors", "../missing"),
    *("/", "/etc/passwd", "/etc/missing", "//etc/passwd", "../root-not/good.safetensors"),
    *("nowhere/../../secret.safetensors", "a" * 300 + "/../../secret.safetensors"),
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path[:40])
def test_what_is_outside_is_forbidden_and_not_told_from_what_is_missing(
    adapters: Adapters, path: str
) -> None:
    with adapters.unchanged():
        answer = load(adapters, "outside", path)
        assert_refused(answer, 403, "forbidden")
        assert answer.json() == load(adapters, "outside", "../no-such-thing").json()


def test_links_out_are_forbidden_and_links_within_are_not(adapters: Adapters, root: Path) -> None:
    links = {
        "file-out": "../secret.safetensors",
        "file-in": "good.safetensors",
        "folder-out": "..",
        "folder-in": "folder",
        "loop": "loop",
        "far-out": "/etc",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "holds-link").mkdir()
    (root / "holds-link" / "out.safetensors").symlink_to("../../secret.safetensors")
    forbidden = ("file-out", "folder-out", "folder-out/secret.safetensors", "holds-link", "loop")
    with adapters.unchanged():
        for path in (*forbidden, "far-out/passwd", "folder-in/../../secret.safetensors"):
            assert_refused(load(adapters, "linked", path), 403, "forbidden")
    for path in ("file-in", "folder-in", "folder-in/only.safetensors"):
        assert load(adapters, "linked", path).status_code == 200
        assert unload(adapters, "linked").status_code == 200


def test_what_is_no_file_to_load_is_refused(adapters: Adapters, root: Path) -> None:
    for name in ("none", "two"):
        (root / name).mkdir()
    for name in ("a", "b"):
        (root / "two" / f"{name}.safetensors").write_bytes(adapters.file(4))
    os.mkfifo(root / "pipe.safetensors")
    paths = ("missing", "none", "two", "pipe.safetensors", "good.safetensors/x", "", "a\0b")
    with adapters.unchanged():
        for path in (*paths, "a" * 300, "a/" * 3000, "\N{PILE OF POO}" * 200):
            assert_refused(load(adapters, "nothing", path), 400, "validation_error")


def test_a_faulty_file_of_the_root_is_refused_as_an_upload_is(
    adapters: Adapters, root: Path
) -> None:
    (root / "junk").write_bytes(b"\x80\x02}q\x00.junk")
    (root / "large").write_bytes(bytes(CAP + 1))
    with adapters.unchanged():
        assert_refused(load(adapters, "faulty", "junk"), 400, "invalid_adapter")
        assert_refused(load(adapters, "faulty", "large"), 413, "body_too_large")
        assert_refused(load(adapters, "plain", "junk", load_inplace=True), 400, "invalid_adapter")


@pytest.mark.parametrize(
    "name", ["..", "a/b/c", "", "base", "Fresh", "ns/load", "plain\n", "a" * 65]
)
def test_a_bad_name_is_refused(adapters: Adapters, name: str) -> None:
    with adapters.unchanged():
        assert_refused(load(adapters, name, "good.safetensors"), 400, "validation_error")


def test_a_name_that_differs_by_case_only_is_a_conflict(adapters: Adapters) -> None:
    with adapters.unchanged():
        assert_refused(load(adapters, "Plain", "good.safetensors"), 409, "name_conflict")


def test_without_an_import_root_nothing_is_loaded(tiny_backbone: Path, tiny_server) -> None:
    with tiny_server.client() as client:
        body = {"lora_name": "x", "lora_path": str(tiny_backbone / "adapters/plain.safetensors")}
        answer = client.post("/v1/load_lora_adapter", json=body)
        assert_refused(answer, 403, "forbidden")
