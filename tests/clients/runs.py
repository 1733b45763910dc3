"""Runs a client's program in its environment, with the address and the adapter replaced."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.catalogue import Client

HERE = Path(__file__).parent
ADDRESS = "http://127.0.0.1:8000"  # of every program
# LiteLLM would fetch its price list first, and try again for ten seconds
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
Outcome = dict[str, object]


@dataclass(frozen=True)
class Run:
    """What one program did, by case: written, nobody, base_url."""

    version: str
    outcomes: dict[str, Outcome]


def run(
    clients: Sequence[Client], interpreter: Path, url: str, adapters: dict[str, str]
) -> dict[Client, Run]:
    """The programs of clients that share an environment and a prelude.

    `adapters`: the names in the programs, and what the server calls them.
    """
    codes = {client: variants(client, url, adapters) for client in clients}
    asked = [code for variants_of in codes.values() for code in variants_of.values()]
    packages = sorted({client.package for client in clients})
    if clients[0].kind == "node":
        answer = run_node(interpreter, asked, packages)
    else:
        answer = run_python(interpreter, asked, packages, clients[0].prelude)
    outcomes = iter(answer["outcomes"])
    return {
        client: Run(answer["versions"][client.package], {case: next(outcomes) for case in cases})
        for client, cases in codes.items()
    }


def variants(client: Client, url: str, adapters: dict[str, str]) -> dict[str, str]:
    """The program as it is written; under an adapter that is not there; and the adapter in the base
    URL with another name as the model, where the program has a model."""
    nobody = dict.fromkeys(adapters, "nobody")
    found = {
        "written": replaced(client.code, url, adapters),
        "nobody": replaced(client.code, url, nobody),
    }
    if client.has_base_url_case:
        own = f"{url}/as/{adapters['scripture']}/-"
        found["base_url"] = replaced(client.code, own, dict.fromkeys(adapters, "anything"))
    return found


def replaced(code: str, url: str, names: dict[str, str]) -> str:
    for written, name in names.items():
        code = code.replace(written, name)
    assert ADDRESS in code
    return code.replace(ADDRESS, url)


def run_python(python: Path, codes: list[str], packages: list[str], prelude: str) -> dict:
    """All programs in one process: an import can take seconds."""
    asked = json.dumps({"programs": codes, "packages": packages, "prelude": prelude})
    done = subprocess.run(
        [python, "-W", "ignore", HERE / "driver.py"],
        input=asked,
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        check=False,
    )
    return last_line(done)


def run_node(modules: Path, codes: list[str], packages: list[str]) -> dict:
    """Each program in a process; `modules` is the folder of node_modules."""
    outcomes = []
    for code in codes:
        with tempfile.NamedTemporaryFile("w", dir=modules, suffix=".mjs") as program:
            program.write(code)
            program.flush()
            command = ["node", HERE / "driver.mjs", program.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            outcomes.append(last_line(done))
    versions = {package: installed(modules, package) for package in packages}
    return {"versions": versions, "outcomes": outcomes}


def installed(modules: Path, package: str) -> str:
    manifest = modules / "node_modules" / package / "package.json"
    return json.loads(manifest.read_text("utf-8"))["version"]


def last_line(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
