"""`trunkline adapters` where no trunkline server answers, and its commands that need none."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli_shell import Shell

from adapters.format import read_adapter


class _Stranger(BaseHTTPRequestHandler):
    """Answers HTML, and remembers the keys it was sent."""

    keys: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.keys.append(self.headers["authorization"])
        self.send_response(404)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Stranger) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_key_is_sent_and_a_stranger_is_told_apart(stranger: str) -> None:
    result = Shell(stranger).run("show", "a", "--key", "secret")
    assert result.exit_code == 1
    assert result.stderr.endswith("answered 404, but not as a trunkline server does\n")
    Shell(stranger).run("show", "a", TRUNKLINE_KEY="other")
    Shell(stranger).run("show", "a")
    assert _Stranger.keys == ["Bearer secret", "Bearer other", None]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense://x", "http://[::", ""])
def test_a_server_out_of_reach_is_one_sentence(url: str) -> None:
    result = Shell("unused").run("ls", "--json", f"--url={url}")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"Error: .*(can't be reached|is no address of a server): .*\n", result.stderr
    )


def test_peft_folders_go_out_and_in_without_a_server(tiny_backbone: Path, tmp_path: Path) -> None:
    """As a process of its own, as a person runs it."""
    full = tiny_backbone / "adapters" / "full.safetensors"
    command = [sys.executable, "-m", "server.cli", "adapters"]
    base = ["--backbone", str(tiny_backbone)]
    out = ["export-peft", str(full), *base, "--out", str(tmp_path / "peft")]
    text = subprocess.run([*command, *out], check=True, capture_output=True, text=True).stdout
    assert "no place for it: classifier.bias, classifier.weight" in text
    shell = Shell("unused")
    back = tmp_path / "back.safetensors"
    shell.shown("import-peft", tmp_path / "peft", *base, "--out", back)
    assert len(read_adapter(back).tensors) == len(read_adapter(full).tensors) - 2
    for wrong in (
        ["import-peft", tmp_path / "none", *base, "--out", back],
        ["import-peft", tmp_path / "peft", "--backbone", tmp_path, "--out", back],
        ["export-peft", tiny_backbone / "config.json", *base, "--out", tmp_path / "x"],
        ["export-peft", tmp_path / "none", *base, "--out", tmp_path / "x"],
    ):
        result = shell.run(*wrong)
        assert result.exit_code == 1
        assert re.fullmatch(r"Error: .+\n", result.stderr)
