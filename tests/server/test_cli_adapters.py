"""`trunkline adapters` against a real server: every command, its JSON, its errors."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cli_shell import Shell
from conftest import TINY, Serve, Served, random_adapter, save_random_adapter

from adapters.format import adapter_bytes, read_adapter, write_adapter
from model.checkpoint import read_backbone


@pytest.fixture(scope="module")
def server(tiny_backbone: Path, serve_for_session: Serve) -> Served:
    """It takes files up to 1 MiB, and does not mind the client's variables."""
    environment = {"TRUNKLINE_URL": "not mine", "TRUNKLINE_MAX_ADAPTER_BYTES": "1MiB"}
    return serve_for_session(tiny_backbone, "--dtype", "float32", **environment)


_numbers = itertools.count()  # a name's versions are never numbered anew


@pytest.fixture
def shell(server: Served) -> Shell:
    return Shell(server.url)


@pytest.fixture(scope="module")
def files(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one, two (LayerNorms, critic, classifier) and three; zero; broken, which is no adapter."""
    folder = tmp_path_factory.mktemp("files")
    digest = read_backbone(tiny_backbone).digest
    few = {(0, "attn.lora_qkv"): 2, (1, "mlp.lora_fc"): 3}
    save_random_adapter(folder / "one.safetensors", TINY, digest, 11, ranks=few)
    save_random_adapter(
        folder / "two.safetensors", TINY, digest, 12, norms=True, critic=True, classes=3
    )
    save_random_adapter(folder / "three.safetensors", TINY, digest, 13, ranks=few)
    zero = {n: t * (".B." not in n) for n, t in random_adapter(TINY, 14).items()}
    odd = {"description": "two\nlines, [red]markup[/red] and \x1b[31mescapes"}
    write_adapter(folder / "zero.safetensors", zero, lora_alpha=8, base_digest=digest, metadata=odd)
    (folder / "broken.safetensors").write_bytes(b"not an adapter")
    return folder


@pytest.fixture
def poems(shell: Shell, files: Path) -> Iterator[str]:
    """A new name with the versions 1, 2 and 3, the last one current."""
    name = f"team/poems-{next(_numbers)}"
    for file in ("one", "two", "three"):
        shell.shown("push", files / f"{file}.safetensors", name)
    yield name
    shell.run("rm", name)


def current(server: Served, name: str, alias: str = "current") -> int:
    answer = httpx.get(f"{server.url}/adapters/{name}").json()
    number: int = answer["aliases"][alias]["version"]
    return number


def numbers(server: Served, name: str) -> list[int]:
    versions: list[int] = httpx.get(f"{server.url}/adapters/{name}").json()["versions"]
    return [version["version"] for version in versions]


def test_push_stores_the_very_file_and_says_what_it_changes(shell: Shell, files: Path) -> None:
    answer = shell.answer("push", files / "two.safetensors", "pushed")
    assert answer["version"] == 1
    assert answer["digest"] == read_adapter(files / "two.safetensors").digest
    again = shell.shown("push", files / "two.safetensors", "pushed")
    assert "pushed@1 was there already" in again
    new = shell.shown("push", files / "one.safetensors", "pushed")
    assert "pushed@2 is new" in new
    assert "2 sites in layers 0-1 (rank 3)" in new
    shell.shown("rm", "pushed")


def test_push_has_a_progress_bar_on_a_terminal_only(shell: Shell, files: Path) -> None:
    file = files / "one.safetensors"
    on_terminal = shell.run("push", file, "bar", FORCE_COLOR="1")
    assert re.search(r"bar .*━.*kB", on_terminal.stderr)
    assert shell.run("push", file, "bar").stderr == ""
    shell.shown("rm", "bar")


def test_push_conditions_hold(shell: Shell, files: Path, server: Served, poems: str) -> None:
    one = files / "one.safetensors"
    assert "is at 3 (version_conflict)" in shell.error("push", one, poems, "--if-match", 2)
    assert "exists already, and is at 3 (version_conflict)" in shell.error(
        "push", one, poems, "--new"
    )
    shell.shown("push", one, poems, "--no-activate")
    assert numbers(server, poems) == [1, 2, 3, 4]
    assert current(server, poems) == 3
    assert shell.answer("push", one, poems, "--if-match", 3)["version"] == 5
    assert current(server, poems) == 5


def test_push_refusals_are_the_servers_sentences(shell: Shell, files: Path, tmp_path: Path) -> None:
    zero = files / "zero.safetensors"
    assert "(adapter_has_no_effect)" in shell.error("push", zero, "zero")
    assert "(invalid_adapter)" in shell.error("push", files / "broken.safetensors", "broken")
    assert "(validation_error)" in shell.error("push", zero, "Upper")
    large = {"transformer.h.0.attn.lora_qkv.A.weight": torch.zeros(1 << 17, 16)}
    write_adapter(tmp_path / "large.safetensors", large, lora_alpha=8, base_digest=None)
    assert "(body_too_large)" in shell.error("push", tmp_path / "large.safetensors", "large")
    assert shell.answer("push", zero, "zero", "--allow-zero")["version"] == 1
    shell.shown("rm", "zero")


def test_what_was_uploaded_is_never_markup_or_an_escape(shell: Shell, files: Path) -> None:
    shell.shown("push", files / "zero.safetensors", "odd", "--allow-zero")
    shown = shell.shown("show", "odd", FORCE_COLOR="1")
    assert "two�lines, [red]markup[/red] and �[31mescapes" in shown
    shell.shown("rm", "odd")


def test_ls_lists_all_in_aligned_columns(shell: Shell, poems: str) -> None:
    answer = shell.answer("ls")
    names = [row["name"] for row in answer["data"]]
    assert names == sorted(names)
    assert {"classes", "full", "plain", poems} == set(names)
    shell.shown("promote", poems, 1, "--alias", "stable")
    lines = shell.shown("ls").splitlines()
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith(poems))
    assert row.split()[:4] == [poems, "3", "stable=1", "3"]
    digest = next(row["digest"] for row in answer["data"] if row["name"] == poems)
    assert row.index(digest.removeprefix("sha256:")[:12]) == lines[0].index("Digest")
    assert digest not in row


def test_ls_reads_every_page(shell: Shell, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.cli.client.PAGE", 1)
    rows = httpx.get(f"{server.url}/adapters").json()["data"]
    assert [r["name"] for r in shell.answer("ls")["data"]] == [r["name"] for r in rows]


def test_show_tells_versions_aliases_and_history(shell: Shell, server: Served, poems: str) -> None:
    shell.shown("promote", poems, 2, "--alias", "stable")
    answer = shell.answer("show", poems)
    assert answer == httpx.get(f"{server.url}/adapters/{poems}").json()
    shown = shell.shown("show", poems)
    assert re.search(r"current +3 +2 +3\n", shown)
    assert re.search(r"stable +2 +1\n", shown)
    for version in answer["versions"]:
        assert version["digest"].removeprefix("sha256:")[:12] in shown
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d +\S+ +point +alias stable, version 2", shown)
    assert "(adapter_not_found)" in shell.error("show", "nothing")


def test_promote_and_rollback_move_the_pointer(shell: Shell, server: Served, poems: str) -> None:
    assert f"{poems}@current is version 1 (before: 3)" in shell.shown("promote", poems, 1)
    assert current(server, poems) == 1
    assert shell.answer("rollback", poems)["version"] == 3
    assert current(server, poems) == 3
    shell.shown("promote", poems, 2, "--alias", "stable")
    assert "(version_not_found)" in shell.error("rollback", poems, "--alias", "stable")
    shell.shown("promote", poems, 1, "--alias", "stable")
    shell.shown("rollback", poems, "--alias", "stable")
    assert current(server, poems, "stable") == 2
    assert current(server, poems) == 3
    assert "(version_not_found)" in shell.error("promote", poems, 9)
    assert "(adapter_not_found)" in shell.error("rollback", "nothing")


def test_rollback_does_not_undo_what_another_did_meanwhile(
    shell: Shell, server: Served, poems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = httpx.Client.request

    def overtaken(client: httpx.Client, method: str, url: str, **options: Any) -> httpx.Response:
        if method == "PUT":
            point = f"{server.url}/adapters/{poems}/aliases/current"
            request(client, "PUT", point, json={"version": 1})
        return request(client, method, url, **options)

    monkeypatch.setattr(httpx.Client, "request", overtaken)
    result = shell.run("rollback", poems)
    assert result.exit_code == 1
    assert "(version_conflict)" in result.stderr
    assert current(server, poems) == 1


def test_load_pin_unpin_unload_by_reference(shell: Shell, poems: str) -> None:
    reference = f"{poems}@1"
    assert shell.answer("load", reference)["resident"]
    assert shell.shown("pin", reference) == f"{reference} is in the slots, pinned\n"
    assert shell.answer("unpin", reference)["pinned"] is False
    assert shell.shown("unload", reference) == f"{reference} is not in the slots\n"
    for command in ("load", "unload", "pin", "unpin"):
        assert "(version_not_found)" in shell.error(command, f"{poems}@9")
        assert "(validation_error)" in shell.error(command, "a/load")


def test_rm_unpublishes_a_version_or_all(shell: Shell, server: Served, poems: str) -> None:
    assert shell.shown("rm", poems, 2) == f"{poems}@2 is unpublished\n"
    assert numbers(server, poems) == [1, 3]
    assert "(version_not_found)" in shell.error("rm", poems, 2)
    assert shell.answer("rm", poems) == {"name": poems, "version": None, "in_flight": 0}
    assert "(adapter_not_found)" in shell.error("rm", poems)


def test_a_name_is_never_taken_for_a_route(shell: Shell, server: Served, poems: str) -> None:
    for name in (f"{poems}/versions/1", "..", "", "base", "a?b"):
        assert "(validation_error)" in shell.error("rm", name)
    assert numbers(server, poems) == [1, 2, 3]


def test_diff_names_what_differs(shell: Shell, poems: str) -> None:
    answer = shell.answer("diff", f"{poems}@1", f"{poems}@2")
    found = {(d["kind"], d["key"]): (d["a"], d["b"]) for d in answer["differences"]}
    assert found["rank", "transformer.h.0.attn.lora_qkv"] == (2, 4)
    assert found["rank", "transformer.h.1.attn.lora_out"] == (None, 4)
    assert found["norm", "transformer.ln_f"] == (None, True)
    assert found["head", "critic"] == (None, True)
    assert found["labels", ""] == (None, "label-0, label-1, label-2")
    assert len(found) == 8 + 2 + 2 + 1
    shown = shell.shown("diff", f"{poems}@1", f"{poems}@2")
    assert re.search(r"transformer\.h\.0-1\.attn\.lora_out +- +4", shown)
    digest = answer["b"]["digest"]
    assert shell.answer("diff", f"{poems}@1", f"{poems}@{digest[:19]}")["b"] == answer["b"]


def test_diff_tells_the_norms_of_what_each_changes_and_of_the_difference(
    shell: Shell, files: Path, poems: str
) -> None:
    """Held against the updates in full, of the two files."""
    answer = shell.answer("diff", f"{poems}@1", poems)
    one, three = (read_adapter(files / f"{name}.safetensors") for name in ("one", "three"))
    keys = [place["key"] for place in answer["weights"]]
    assert keys == ["transformer.h.0.attn.lora_qkv", "transformer.h.1.mlp.lora_fc"]
    shown = shell.shown("diff", f"{poems}@1", poems)
    for place in answer["weights"]:
        a, b = (
            each.scaling(len(each.tensors[f"{place['key']}.A.weight"]))
            * (each.tensors[f"{place['key']}.B.weight"] @ each.tensors[f"{place['key']}.A.weight"])
            for each in (one, three)
        )
        norms = [float(torch.linalg.matrix_norm(x)) for x in (a, b, a - b)]
        found = [place[name] for name in ("a", "b", "difference", "relative")]
        assert found == pytest.approx([*norms, norms[2] / max(norms[:2])], rel=1e-4)
        cells = " +".join(re.escape(f"{number:#.4g}") for number in found)
        assert re.search(rf"^{re.escape(place['key'])} +{cells}$", shown, re.MULTILINE)


def test_diff_counts_the_places_that_are_alike(
    shell: Shell, files: Path, poems: str, tmp_path: Path
) -> None:
    two = read_adapter(files / "two.safetensors")
    head = {"critic_head.weight": two.tensors["critic_head.weight"] * 2}
    (tmp_path / "four.safetensors").write_bytes(
        adapter_bytes(two.tensors | head, two.metadata | {"description": "louder"})
    )
    shell.shown("push", tmp_path / "four.safetensors", poems)
    shown = shell.shown("diff", f"{poems}@2", f"{poems}@4")
    assert re.search(r"metadata +description +- +louder", shown)
    assert re.search(r"^critic_head +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+$", shown, re.MULTILINE)
    assert shown.count("transformer.") == 0
    assert "11 places changed alike, to the last bit" in shown


def test_diff_of_the_same_file_and_of_what_is_not_there(shell: Shell, poems: str) -> None:
    assert "are the same file" in shell.shown("diff", poems, f"{poems}@3")
    assert "(version_not_found)" in shell.error("diff", poems, f"{poems}@stable")
    assert "(adapter_not_found)" in shell.error("diff", "nothing", poems)


def test_verify_hashes_the_files_and_fails_for_a_damaged_one(
    shell: Shell, server: Served, poems: str
) -> None:
    assert shell.answer("verify")["sound"] is True
    assert shell.shown("verify", poems).count("sound") == 3
    digest = shell.answer("show", poems)["versions"][1]["digest"].removeprefix("sha256:")
    blob = next(Path(f"{server.log}.data").rglob(digest))
    sound = blob.read_bytes()
    blob.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    for words in (["verify"], ["verify", poems]):
        result = shell.run(*words)
        assert result.exit_code == 1
        assert re.search(rf"{poems} +2 +its bytes are not those of its digest", result.stdout)
        as_json = shell.run(*words, "--json")
        assert as_json.exit_code == 1
        assert json.loads(as_json.stdout)["sound"] is False
    blob.write_bytes(sound)
