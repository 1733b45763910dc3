"""Every embedding client, with nothing changed but its base URL, gets the vectors of /encode."""

import numpy as np
import pytest
from clients.catalogue import EMBEDDINGS, LANGCHAIN_DEFAULTS, Client
from clients.comparing import BY_MODEL, BY_URL, TOLERANCE, demand_refusal, each, encoded, own_column
from clients.conftest import Runs
from clients.table import Table
from conftest import Served

TEXTS = ["In the beginning", "To be, or not to be"]  # of every program


@pytest.fixture(scope="module")
def expected(server: Served, adapters: dict[str, str]) -> np.ndarray:
    """(2, C): the texts under the adapter, which are not what the trunk alone gives."""
    own = encoded(server, adapters["scripture"], TEXTS)
    assert np.abs(own - encoded(server, None, TEXTS)).max() > 1e-2
    return own


@each(EMBEDDINGS)
def test_vectors_are_those_of_encode(
    client: Client, runs: Runs, expected: np.ndarray, table: Table
) -> None:
    run = runs(client)
    assert "vectors" in run.outcomes["written"], run.outcomes["written"]
    np.testing.assert_allclose(run.outcomes["written"]["vectors"], expected, **TOLERANCE)
    table.fill(client.name, run.version, own_column(client), "exact")


@each(tuple(client for client in EMBEDDINGS if client.has_base_url_case))
def test_the_adapter_in_the_base_url_wins_over_the_model(
    client: Client, runs: Runs, expected: np.ndarray, table: Table
) -> None:
    run = runs(client)
    assert "vectors" in run.outcomes["base_url"], run.outcomes["base_url"]
    np.testing.assert_allclose(run.outcomes["base_url"]["vectors"], expected, **TOLERANCE)
    table.fill(client.name, run.version, BY_URL, "exact")


@each(EMBEDDINGS)
def test_an_unknown_adapter_is_the_clients_own_exception_with_our_sentence(
    client: Client, runs: Runs, table: Table
) -> None:
    demand_refusal(client, runs(client), table)


@each(LANGCHAIN_DEFAULTS)
def test_langchains_default_is_refused_and_told_its_setting(
    client: Client, runs: Runs, table: Table
) -> None:
    """Its token ids are another tokenizer's: any vector would be wrong."""
    run = runs(client)
    for case in ("written", "base_url"):
        error = run.outcomes[case]["error"]
        assert error["type"] == "openai.BadRequestError", error
        assert "check_embedding_ctx_length=False" in error["message"]
    table.fill(client.name, run.version, BY_MODEL, "refused: `openai.BadRequestError`")
    table.fill(client.name, run.version, BY_URL, "refused: `openai.BadRequestError`")
