"""The server, the environments and the runs that the tests of all clients share.

`make test` runs those that start quickly and whose package is in `.venv`, with the tiny trunk;
`make clients` runs all of them, each in an environment of its own, with the demo, as in
docs/clients.md.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clients.catalogue import ALL, Client
from clients.environments import IN_VENV, is_prepared
from clients.runs import Run, run
from clients.table import Table
from conftest import Serve, Served

FOLDER = Path(os.environ["CLIENTS"]).resolve() if os.environ.get("CLIENTS") else None
RUNNING = os.environ.get("CLIENTS_URL")  # a server of the demo in float32 that runs already
# The programs' adapters and, for `make test`, which of the tiny trunk stand for them
DEMO_ADAPTERS = {"scripture": "scripture", "supersense": "supersense"}
TINY_ADAPTERS = {"scripture": "plain", "supersense": "classes"}
Runs = Callable[[Client], Run]


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Served:
    if FOLDER is None:
        return request.getfixturevalue("tiny_server")
    if RUNNING is not None:
        return Served(None, RUNNING, None)
    serve: Serve = request.getfixturevalue("serve_for_session")
    return serve("--dtype", "float32")


@pytest.fixture(scope="session")
def adapters() -> dict[str, str]:
    return TINY_ADAPTERS if FOLDER is None else DEMO_ADAPTERS


@pytest.fixture(scope="session")
def runs(server: Served, adapters: dict[str, str]) -> Runs:
    """Each program is run once, with the others of its environment; what it did is kept."""
    done: dict[Client, Run] = {}

    def of(client: Client) -> Run:
        if client not in done:
            together = [other for other in ALL if other.process == client.process]
            done.update(run(together, interpreter_of(client), server.url, adapters))
        return done[client]

    return of


def interpreter_of(client: Client) -> Path:
    """The client's Python, or the folder of its node modules; skips where it is not installed."""
    if FOLDER is None:
        pytest.importorskip(IN_VENV[client.environment])
        return Path(sys.executable)
    if not is_prepared(FOLDER, client.kind, client.environment):
        pytest.skip(f"{client.environment} is not installed in {FOLDER}")
    place = FOLDER / client.environment
    return place if client.kind == "node" else place / "bin" / "python"


@pytest.fixture(scope="session")
def table() -> Iterator[Table]:
    """What the tests showed; written for the page at the end."""
    table, began = Table(), time.monotonic()
    yield table
    if FOLDER is not None:
        table.write(FOLDER / "table.md")
        print(f"\n{table.markdown()}\n{time.monotonic() - began:.0f} s for all clients")
