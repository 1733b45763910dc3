"""The documents: what can be run is run, and what they name is there."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import click
import pytest
from conftest import Serve, Served

from server.cli import main
from server.errors import STATUS
from server.settings import Settings

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
ADDRESS = "http://127.0.0.1:8000"  # of the documents; the test's server has another port
RUNNABLE = ("bash", "python")
# An error answer must fail a block, and nothing is downloaded that stands in a page
PRELUDE = """set -euo pipefail
curl() { command curl --fail-with-body --show-error "$@" && echo; }
"""


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block, also of those within tabs."""
    fence = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    found = fence.findall((DOCS / page).read_text("utf-8"))
    return [(kind, textwrap.dedent(code)) for _, kind, code in found if kind in languages]


@pytest.fixture(scope="module")
def demo(serve_for_session: Serve) -> Served:
    return serve_for_session()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the blocks run: it has a .venv, as a checkout has after `make serve`."""
    path = tmp_path_factory.mktemp("docs")
    (path / ".venv").symlink_to(Path(sys.prefix))
    return path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, *RUNNABLE)])
def test_every_block_of_a_page_that_can_run_runs(page: str, demo: Served, folder: Path) -> None:
    environment = os.environ | {
        "TRUNKLINE_URL": demo.url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for kind, code in blocks(page, *RUNNABLE):
        here = code.replace(ADDRESS, demo.url)
        command = ["bash", "-c", PRELUDE + here] if kind == "bash" else [sys.executable, "-c", here]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or code.startswith("cat >"), f"nothing was printed by\n{code}"


def test_the_error_table_is_the_servers() -> None:
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert {code: int(status) for code, status, _, _ in rows} == STATUS
    assert len(rows) == len(STATUS)


@pytest.mark.parametrize("page", PAGES)
def test_routes_named_are_the_servers(page: str, demo: Served) -> None:
    with demo.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    known = {
        (method.upper(), re.sub(r"\{\w+(?::\w+)?\}", "{}", path))
        for path, methods in paths.items()
        for method in methods
    }
    text = (DOCS / page).read_text("utf-8")
    named = re.findall(r"`(GET|POST|PUT|DELETE) (/[^`\s,?]*)`", text)
    assert {(method, re.sub(r"\{\w+\}", "{}", path)) for method, path in named} <= known


@pytest.mark.parametrize("page", PAGES)
def test_metrics_named_are_the_servers(page: str, demo: Served) -> None:
    with demo.client() as client:
        client.post("/encode", json={"inputs": "To be"})
        exported = client.get("/metrics").text
    named = re.findall(r"`(trunkline_\w+)", (DOCS / page).read_text("utf-8"))
    assert [name for name in named if name not in exported] == []


def test_settings_shown_are_ones_that_the_server_takes() -> None:
    shown = [code for page in PAGES for _, code in blocks(page, "toml")]
    assert shown
    for code in shown:
        Settings(**tomllib.loads(code))


def test_flags_of_the_load_test_are_locusts_or_its_own() -> None:
    if importlib.util.find_spec("locust") is None:
        pytest.skip("the extra loadtest is not installed: no Locust")
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--help"]
    locust = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = [sys.executable, "-m", "loadtest", "--help"]
    own = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text = (DOCS / "loadtest.md").read_text("utf-8").replace("--profile load", "")
    named = set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", text))
    assert named
    assert [flag for flag in named if flag not in locust + own] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_are_the_command_lines(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    context = click.Context(main)
    for first, second in re.findall(r"(?:^|[`$ ])trunkline ([a-z]+)(?: ([a-z][a-z-]+))?", text):
        command = main.get_command(context, first)
        if command is None:
            assert not re.search(
                rf"`trunkline {first}|^\s*(\$ )?trunkline {first}", text, re.MULTILINE
            )
            continue  # prose: trunkline serves thousands of ...
        if isinstance(command, click.Group) and second:
            assert second in command.list_commands(context), f"trunkline {first} {second}"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_named_are_there(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"\bmake ([a-z][a-z-]+)(?=[`\s]*(?:$|[ `;]))", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE) or target in ("the", "sense")
    for path in re.findall(r"`((?:deploy|loadtest)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_tests_and_modules_named_are_there() -> None:
    """A name that ends in an ellipsis is the beginning of one."""
    sources = {path: path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py")}
    tests = re.findall(r"^ *(?:async )?def (test_\w+)", "\n".join(sources.values()), re.MULTILINE)
    files = {path.name for path in sources}
    for document in (*DOCS.glob("*.md"), *ROOT.glob("*.md")):
        text = document.read_text("utf-8")
        for name, cut in re.findall(r"`(test_\w+)(…?)`", text):
            known = any(test.startswith(name) for test in tests) if cut else name in tests
            assert known, f"{document.name} names {name}"
        for name in re.findall(r"`(test_\w+\.py)`", text):
            assert name in files, f"{document.name} names {name}"
        for path in re.findall(r"`((?:adapters|model|server|tests)/[\w/]+\.py)`", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("the extra docs is not installed: no mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "index.html").is_file()
    assert (tmp_path / "pictures" / "trunk.svg").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_there_and_say_what_they_show(page: str) -> None:
    for words, path in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", (DOCS / page).read_text("utf-8")):
        assert words
        assert (DOCS / path).is_file()
