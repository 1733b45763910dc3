"""trunkline encode, critic, classify, info, adapters pull and push of folders, against a server."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import Served

from adapters.peft import export_peft
from model.checkpoint import read_backbone
from server.cli import main

TEXTS = ["to be", "or not to be"]


def run(served: Served, *words: str | Path, stdin: str | None = None, **environment: str) -> Result:
    variables = {"COLUMNS": "100", "TRUNKLINE_URL": served.url} | environment
    return CliRunner().invoke(main, list(map(str, words)), env=variables, input=stdin)


def shown(served: Served, *words: str | Path, **more: str) -> str:
    result = run(served, *words, **more)
    assert result.exit_code == 0, result.output
    return result.stdout


def failed(served: Served, *words: str | Path) -> str:
    result = run(served, *words)
    assert result.exit_code != 0
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def ask(served: Served, path: str, **body: object) -> dict:
    answer = httpx.post(f"{served.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("command", ["encode", "critic", "classify"])
def test_json_is_the_servers_own(tiny_server: Served, command: str) -> None:
    answer = json.loads(shown(tiny_server, command, *TEXTS, "--adapter", "full", "--json"))
    expected = ask(tiny_server, f"/{command}", inputs=TEXTS, adapter="full")
    if command == "classify":
        expected["data"] = [row | {"labels": row["labels"][:3]} for row in expected["data"]]
    assert answer["data"] == expected["data"]
    assert answer["usage"] == expected["usage"]


def test_texts_come_from_stdin_a_line_each(tiny_server: Served) -> None:
    lines = "to be\n\nor not to be\r\n"
    answer = json.loads(shown(tiny_server, "encode", "-", "--json", stdin=lines))
    assert answer["data"] == ask(tiny_server, "/encode", inputs=TEXTS)["data"]
    assert "there is no text" in failed(tiny_server, "encode", "-")


def test_encode_shows_a_line_for_each_text_and_adapter(tiny_server: Served) -> None:
    many = ("--adapter", "full", "--adapter", "base")
    outputs = ("--output", "embedding", "--output", "critic", "--pooling", "last")
    lines = shown(tiny_server, "encode", *TEXTS, *many, *outputs, "--dimensions", "8").splitlines()
    rows = ask(
        tiny_server, "/encode", inputs=TEXTS, adapters=["full", "base"], pooling="last",
        dimensions=8, outputs=["embedding", "critic"],
    )["data"]  # fmt: skip
    assert lines[0].split() == ["Text", "Adapter", "Embedding", "Score"]
    assert len(lines) == 2 + 4
    for line, row, text in zip(lines[2:], rows, sorted(TEXTS * 2, reverse=True), strict=True):
        assert line.startswith(text)
        assert ("full@1" in line) == (row["adapter"] is not None)
        assert f"{row['embedding'][0]:.4f}" in line
        assert "(8)" in line
        assert line.rstrip().endswith(f"{row['critic']['score']:.4f}")


def test_encode_writes_a_numpy_file(tiny_server: Served, tmp_path: Path) -> None:
    file = tmp_path / "rows.npy"
    lines = shown(tiny_server, "encode", *TEXTS, "--adapter", "plain", "--npy", file).splitlines()
    assert [line.endswith("in the file") for line in lines[2:]] == [True, True]
    rows = ask(tiny_server, "/encode", inputs=TEXTS, adapter="plain")["data"]
    expected = np.array([row["embedding"] for row in rows], "<f4")
    assert np.array_equal(np.load(file), expected)
    assert list(tmp_path.iterdir()) == [file]
    assert "needs --output embedding" in failed(
        tiny_server, "encode", "a", "--output", "critic", "--npy", file
    )
    for place in (tmp_path / "x" / "y.npy", file / "y.npy"):  # below nothing, and below a file
        assert "can't be written" in failed(tiny_server, "encode", "a", "--npy", place)
        assert "can't be written" in failed(tiny_server, "adapters", "pull", "plain", place)


def test_critic_marks_doubtful_tokens_on_a_terminal_and_lists_them_elsewhere(
    tiny_server: Served,
) -> None:
    (row,) = ask(tiny_server, "/critic", inputs="or not to be", adapter="full")["data"]
    wrongness = sorted(token["wrongness"] for token in row["tokens"])
    threshold = wrongness[-3]
    command = ("critic", "or not to be", "--adapter", "full", "--threshold", str(threshold))
    lines = shown(tiny_server, *command).splitlines()
    assert lines[0].startswith(f"full@1: score {row['score']:.4f}")
    assert lines[1] == "or not to be"
    listed = {line.rsplit(maxsplit=1)[-1] for line in lines[4:]}
    assert listed == {f"{value:.4f}" for value in wrongness[-3:]}
    coloured = shown(tiny_server, *command, FORCE_COLOR="1", TERM="xterm-256color")
    assert ("\x1b[" in coloured.splitlines()[1]) == (wrongness[-1] >= 0.25)
    assert "Wrongness" not in coloured


def test_classify_shows_the_best_labels(tiny_server: Served) -> None:
    lines = shown(tiny_server, "classify", "to be", "--adapter", "classes", "--top-k", "2")
    (row,) = ask(tiny_server, "/classify", inputs="to be", adapter="classes", top_k=2)["data"]
    for line, label in zip(lines.splitlines()[2:], row["labels"], strict=True):
        assert line.split()[-2:] == [label["label"], f"{label['score']:.4f}"]
    assert "(classifier_not_available)" in failed(tiny_server, "classify", "to be")


def test_info_shows_what_is_served(tiny_server: Served) -> None:
    lines = shown(tiny_server, "info")
    body = httpx.get(f"{tiny_server.url}/info").json()
    for fact in ("tiny", body["version"], "float32 on cpu", "texts of up to 64"):
        assert fact in lines
    assert json.loads(shown(tiny_server, "info", "--json"))["config"] == body["config"]


def test_errors_are_sentences(tiny_server: Served) -> None:
    assert "(adapter_not_found)" in failed(tiny_server, "encode", "a", "--adapter", "nothing")
    assert "(validation_error)" in failed(tiny_server, "encode", "a", "--adapter", "No Name")
    assert "(sequence_too_long)" in failed(tiny_server, "encode", "a" * 65)
    assert shown(tiny_server, "encode", "a" * 65, "--truncate")
    assert "can't be reached" in failed(tiny_server, "info", "--url", "http://127.0.0.1:9")
    assert "can't be reached" in failed(tiny_server, "info", "--url", "unix:///no/such/socket")


def test_an_address_needs_no_scheme(tiny_server: Served) -> None:
    assert "tiny" in shown(tiny_server, "info", "--url", tiny_server.url.removeprefix("http://"))


@contextmanager
def unix_socket(path: Path, url: str) -> Iterator[None]:
    """A unix socket that passes one connection on to a server."""
    target = urlsplit(url)

    def copy(source: socket.socket, sink: socket.socket) -> None:
        while part := source.recv(65536):
            sink.sendall(part)

    def relay() -> None:
        client, _ = listener.accept()
        address = (target.hostname, target.port)
        with closing(client), closing(socket.create_connection(address)) as server:
            back = threading.Thread(target=copy, args=(server, client), daemon=True)
            back.start()
            copy(client, server)
            server.shutdown(socket.SHUT_RDWR)
            back.join()

    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=relay)
        thread.start()
        yield
        thread.join(30)


def test_a_unix_socket_is_an_address(tiny_server: Served, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with unix_socket(path, tiny_server.url):
        assert "tiny" in shown(tiny_server, "info", "--url", f"unix://{path}")


COMMANDS = ["encode", "critic", "classify", "info", "adapters push", "adapters pull", "adapters ls"]


def test_no_command_for_a_server_imports_torch() -> None:
    """Torch alone takes a second, and a client's machine need not have it."""
    code = f"""
import sys
from click.testing import CliRunner
from server.cli import main
for command in {COMMANDS!r}:
    result = CliRunner().invoke(main, [*command.split(), "--help"])
    assert result.exit_code == 0 and "--url" in result.output, result.output
print([name for name in ("torch", "numpy", "pydantic", "fastapi") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Push and pull.


def test_what_was_pushed_is_pulled_to_the_byte(
    tiny_server: Served, tiny_backbone: Path, tmp_path: Path
) -> None:
    original = tiny_backbone / "adapters" / "full.safetensors"
    copy = tmp_path / "pulled.safetensors"
    copy.write_bytes(original.read_bytes())
    assert "pulled@1 is new" in shown(tiny_server, "adapters", "push", copy)
    out = tmp_path / "out.safetensors"
    answer = json.loads(shown(tiny_server, "adapters", "pull", "pulled@1", out, "--json"))
    assert out.read_bytes() == original.read_bytes()
    assert (answer["name"], answer["version"], answer["file"]) == ("pulled", 1, str(out))
    out.write_bytes(b"mine")
    assert "exists already" in failed(tiny_server, "adapters", "pull", "pulled", out)
    assert out.read_bytes() == b"mine"
    shown(tiny_server, "adapters", "pull", "pulled", out, "--force")
    assert out.read_bytes() == original.read_bytes()
    assert "(adapter_not_found)" in failed(tiny_server, "adapters", "pull", "no", tmp_path / "no")
    assert {path.name for path in tmp_path.iterdir()} == {copy.name, out.name}
    shown(tiny_server, "adapters", "rm", "pulled")


def test_a_file_that_is_cut_off_is_not_pulled(
    tiny_server: Served, tiny_backbone: Path, tmp_path: Path
) -> None:
    source = tmp_path / "cut.safetensors"
    source.write_bytes((tiny_backbone / "adapters" / "classes.safetensors").read_bytes())
    shown(tiny_server, "adapters", "push", source, "cut")
    digest = httpx.get(f"{tiny_server.url}/adapters/cut").json()["digest"]
    (blob,) = Path(f"{tiny_server.log}.data").rglob(digest.removeprefix("sha256:"))
    sound = blob.read_bytes()
    try:
        for damage in (sound[:-1], sound[:-1] + bytes([sound[-1] ^ 1])):
            blob.write_bytes(damage)
            assert failed(tiny_server, "adapters", "pull", "cut", tmp_path / "out")
            assert list(tmp_path.iterdir()) == [source]
    finally:
        blob.write_bytes(sound)
    shown(tiny_server, "adapters", "rm", "cut")


def test_a_peft_folder_and_its_archives_are_pushed(
    tiny_server: Served, tiny_backbone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "my-tone"
    full = tiny_backbone / "adapters" / "full.safetensors"
    export_peft(full, read_backbone(tiny_backbone), folder)
    said = shown(tiny_server, "adapters", "push", folder)
    assert "my-tone@1 is new" in said
    assert "from PEFT    LoRA on 8 linears, alpha 8" in said
    digest = json.loads(shown(tiny_server, "adapters", "show", "my-tone", "--json"))["digest"]
    for suffix, kind in ((".zip", "zip"), (".tar.gz", "gztar"), (".tar", "tar")):
        archive = shutil.make_archive(str(tmp_path / "my-tone"), kind, tmp_path, "my-tone")
        assert archive.endswith(suffix)
        answer = json.loads(shown(tiny_server, "adapters", "push", archive, "--json"))
        assert (answer["name"], answer["digest"]) == ("my-tone", digest)
    (folder / "adapter_config.json").unlink()
    assert "is no PEFT folder: adapter_config.json is missing" in failed(
        tiny_server, "adapters", "push", folder
    )
    shown(tiny_server, "adapters", "rm", "my-tone")


def test_ls_searches_and_sorts(tiny_server: Served) -> None:
    rows = json.loads(shown(tiny_server, "adapters", "ls", "--sort", "bytes", "--desc", "--json"))
    sizes = [row["bytes"] for row in rows["data"]]
    assert sizes == sorted(sizes, reverse=True)
    found = json.loads(shown(tiny_server, "adapters", "ls", "lai", "--json"))
    assert [row["name"] for row in found["data"]] == ["plain"]
