"""The `trunkline` program starts in any folder, whatever modules that folder has."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from loadtest.environment import own_packages

ROOT = Path(__file__).parent.parent
OWN = ("adapters", "loadtest", "model", "server")
# What the generated script does: pyproject.toml names it.
SCRIPT = "import sys; from trunkline_launcher.__main__ import main; sys.exit(main())"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with modules of our packages' names, as the owner's repository has a model.py."""
    folder = tmp_path / "user"
    folder.mkdir()
    for name in OWN:
        (folder / f"{name}.py").write_text('raise RuntimeError("the user\'s own module")\n')
    return folder


@pytest.fixture(params=["source tree", "wheel"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder for the end of sys.path: of an editable install, or with everything in it."""
    site = tmp_path / "site-packages"
    site.mkdir()
    if request.param == "source tree":
        (site / "trunkline_launcher").symlink_to(ROOT / "server" / "launcher")
        return site
    (site / "trunkline_launcher").mkdir()
    for file in (ROOT / "server" / "launcher").glob("*.py"):
        (site / "trunkline_launcher" / file.name).write_bytes(file.read_bytes())
    for name in OWN:
        (site / name).symlink_to(ROOT / name)
    return site


def run(*command: str, folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_script_is_installed_under_a_name_of_its_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["trunkline"] == "trunkline_launcher.__main__:main"
    places = project["tool"]["setuptools"]["package-dir"]
    assert {ROOT / place for place in places.values()} == {ROOT / "server" / "launcher"}
    assert set(places) <= set(project["tool"]["setuptools"]["packages"])


def test_it_starts_in_a_folder_with_modules_of_the_same_names(site: Path, hostile: Path) -> None:
    path = os.pathsep.join((".", str(hostile), str(site)))
    arguments = ("keys", "--file", "none.json", "ls")
    done = run(sys.executable, "-c", SCRIPT, *arguments, folder=hostile, path=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no keys in none.json\n"


def test_a_broken_installation_is_a_sentence(site: Path, hostile: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "trunkline_launcher"
    broken.mkdir(parents=True)
    (broken / "__main__.py").write_bytes((ROOT / "server/launcher/__main__.py").read_bytes())
    path = os.pathsep.join((".", str(broken.parent)))
    done = run(sys.executable, "-c", SCRIPT, "--version", folder=hostile, path=path)
    assert done.returncode == 1
    assert done.stderr.startswith("trunkline: ")
    assert "install trunkline again" in done.stderr


def test_processes_that_a_load_run_starts_find_our_packages_too(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ".")
    path = own_packages()["PYTHONPATH"]
    monkeypatch.setenv("PYTHONSAFEPATH", own_packages()["PYTHONSAFEPATH"])
    done = run(sys.executable, "-m", "server.cli", "--version", folder=hostile, path=path)
    assert done.returncode == 0, done.stderr
