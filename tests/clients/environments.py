"""The environments of the client programs: one virtual environment for each, and node's modules.

`python environments.py FOLDER` prepares them all; one is left alone when it was installed for the
same table of versions.toml.
"""

import json
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

VERSIONS = tomllib.loads((Path(__file__).parent / "versions.toml").read_text("utf-8"))
Install = Callable[[Path, list[str]], None]
STAMP = "installed.json"
# Environments whose programs `make test` runs in the project's own, by the module that they need.
# openai is not among them: tests/server/test_openai.py uses it, and tests/docs runs its program.
IN_VENV = {"huggingface-hub": "huggingface_hub"}


def prepare(folder: Path) -> None:
    """Installs what is missing. Raises CalledProcessError when a package cannot be had."""
    for name, table in VERSIONS["python"].items():
        _installed(folder / name, table, _install_python)
    for name, table in VERSIONS["node"].items():
        _installed(folder / name, table, _install_node)


def is_prepared(folder: Path, kind: str, name: str) -> bool:
    stamp = folder / name / STAMP
    return stamp.is_file() and json.loads(stamp.read_text("utf-8")) == VERSIONS[kind][name]


def python_of(folder: Path, name: str) -> Path:
    return folder / name / "bin" / "python"


def version_of(package: str, environment: str, kind: str = "python") -> str:
    """The version of a package that an environment pins."""
    separator = "==" if kind == "python" else "@"
    pins = (pin.rpartition(separator) for pin in VERSIONS[kind][environment]["packages"])
    return next(version for name, _, version in pins if name == package)


def _installed(place: Path, table: dict[str, list[str]], install: Install) -> None:
    stamp = place / STAMP
    if stamp.is_file() and json.loads(stamp.read_text("utf-8")) == table:
        return
    print(f"installing {', '.join(table['packages'])}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    install(place, table["packages"])
    stamp.write_text(json.dumps(table), encoding="utf-8")


def _install_python(place: Path, packages: list[str]) -> None:
    venv.create(place, with_pip=True)
    command = [place / "bin" / "python", "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(command, check=True)


def _install_node(place: Path, packages: list[str]) -> None:
    place.mkdir(parents=True)
    command = ["npm", "install", "--silent", "--no-fund", "--no-audit", *packages]
    subprocess.run(command, cwd=place, check=True)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
