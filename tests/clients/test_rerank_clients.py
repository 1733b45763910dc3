"""Every rerank client: the cosines of /encode's vectors, best first. And labels as /classify's."""

import numpy as np
import pytest
from clients.catalogue import LABELS, RERANKERS, Client
from clients.comparing import BY_MODEL, BY_URL, TOLERANCE, demand_refusal, each, encoded, own_column
from clients.conftest import Runs
from clients.table import Table
from conftest import Served

QUERY = "the heaven and the earth"  # of every program
TEXTS = ["In the beginning", "To be, or not to be", "a cat"]


@pytest.fixture(scope="module")
def cosines(server: Served, adapters: dict[str, str]) -> dict[bool, np.ndarray]:
    """(3,) under the trunk alone, and with True under the adapter."""
    both = {}
    for named, adapter in ((False, None), (True, adapters["scripture"])):
        query, *texts = encoded(server, adapter, [QUERY, *TEXTS])
        both[named] = np.stack(texts) @ query
    assert np.abs(both[True] - both[False]).max() > 1e-3  # fifty times the tolerance
    return both


def demand_cosines(scores: list[tuple[int, float]], cosines: np.ndarray) -> None:
    assert sorted(index for index, _ in scores) == [0, 1, 2]
    by_index = [score for _, score in sorted(scores)]
    np.testing.assert_allclose(by_index, cosines, **TOLERANCE)


@each(RERANKERS)
def test_scores_are_the_cosines_of_encode(
    client: Client, runs: Runs, cosines: dict[bool, np.ndarray], table: Table
) -> None:
    run = runs(client)
    assert "scores" in run.outcomes["written"], run.outcomes["written"]
    scores = run.outcomes["written"]["scores"]
    demand_cosines(scores, cosines[client.names_adapter])
    if "similarity" not in client.name:
        assert [score for _, score in scores] == sorted((s for _, s in scores), reverse=True)
    column = own_column(client) if client.names_adapter else BY_MODEL
    table.fill(client.name, run.version, column, "exact" if client.names_adapter else "trunk only")
    if client.at_root_only:
        table.fill(client.name, run.version, BY_URL, "the client drops the path")


@each(tuple(c for c in RERANKERS if c.has_base_url_case))
def test_the_adapter_in_the_base_url_wins_over_the_model(
    client: Client, runs: Runs, cosines: dict[bool, np.ndarray], table: Table
) -> None:
    run = runs(client)
    assert "scores" in run.outcomes["base_url"], run.outcomes["base_url"]
    demand_cosines(run.outcomes["base_url"]["scores"], cosines[True])
    table.fill(client.name, run.version, BY_URL, "exact")


@each(tuple(client for client in RERANKERS + LABELS if client.names_adapter))
def test_an_unknown_adapter_is_the_clients_own_exception_with_our_sentence(
    client: Client, runs: Runs, table: Table
) -> None:
    demand_refusal(client, runs(client), table)


@each(LABELS)
def test_labels_are_those_of_classify(
    client: Client, runs: Runs, server: Served, adapters: dict[str, str], table: Table
) -> None:
    run = runs(client)
    body = {"adapter": adapters["supersense"], "inputs": "a cat", "top_k": 3}
    with server.client() as http:
        (row,) = http.post("/classify", json=body).json()["data"]
    assert "labels" in run.outcomes["written"], run.outcomes["written"]
    got = run.outcomes["written"]["labels"]
    assert [label for label, _ in got] == [found["label"] for found in row["labels"]]
    np.testing.assert_allclose(
        [score for _, score in got], [found["score"] for found in row["labels"]], **TOLERANCE
    )
    table.fill(client.name, run.version, BY_URL, "exact")
