"""What the tests of embedding clients and of rerank clients have in common."""

import os

import numpy as np
import pytest
from clients.catalogue import Client
from clients.environments import IN_VENV
from clients.runs import Outcome, Run
from clients.table import Table
from conftest import Served

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32
BY_MODEL, BY_URL, UNKNOWN = "adapter by `model`", "adapter in the base URL", "unknown adapter"


def each(clients: tuple[Client, ...]) -> pytest.MarkDecorator:
    """All under `make clients`; in `make test` those that the project's own environment has."""
    run = [c for c in clients if "CLIENTS" in os.environ or c.environment in IN_VENV]
    none = pytest.param(None, id="none", marks=pytest.mark.skip(reason="by make clients alone"))
    shown = [pytest.param(client, id=client.id) for client in run] or [none]
    return pytest.mark.parametrize("client", shown)


def encoded(server: Served, adapter: str | None, texts: list[str]) -> np.ndarray:
    """(N, C): what POST /encode answers, L2-normalised."""
    with server.client() as http:
        answer = http.post("/encode", json={"adapter": adapter, "inputs": texts}).json()
    return np.array([row["embedding"] for row in answer["data"]])


def own_column(client: Client) -> str:
    """Where the program, as it is written, names its adapter."""
    return BY_URL if client.names_adapter_in_url else BY_MODEL


def demand_refusal(client: Client, run: Run, table: Table) -> None:
    """The client's own exception with the server's sentence, for a name that no adapter has."""
    refused = run.outcomes["nobody"]
    if client.unknown is None:
        assert not is_numbers(refused), refused
        table.fill(client.name, run.version, UNKNOWN, "the client does not look at the status")
        return
    error = refused["error"]
    assert error["type"] == client.unknown, error
    assert "no adapter" in error["message"], error
    table.fill(client.name, run.version, UNKNOWN, f"`{client.unknown}`")


def is_numbers(outcome: Outcome) -> bool:
    value = outcome.get("vectors", outcome.get("scores", []))
    return bool(value) and np.array(value).dtype.kind == "f"
