"""[PAD] in a row is a token like any other to the server; model.gpt.GPT masks it by default.

docs/concepts.md says so. Here is what that means, number by number.
"""

import numpy as np
import pytest
import torch
from conftest import TINY, Served
from reference import Oracle

PAD = TINY.pad_token_id
TOLERANCE = {"rtol": 1e-4, "atol": 5e-5}  # float32
PADDED = {"trailing": [5, 6, 7, PAD, PAD], "leading": [PAD, 5, 6, 7], "inside": [5, PAD, 6, 7]}


def row_of(served: Served, ids: list[int], **body: object) -> dict:
    asked = {"adapter": "full", "inputs": [ids], "outputs": ["tokens", "critic", "embedding"]}
    with served.client() as client:
        answer = client.post("/encode", json=asked | {"normalize": False} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]


def states(row: dict) -> np.ndarray:
    return np.array([token["hidden"] for token in row["tokens"]])


@torch.no_grad()
def by_default(oracle: Oracle, ids: list[int]) -> np.ndarray:
    """What GPT gives without an attention mask of the caller's: it makes one that hides [PAD]."""
    return oracle.gpts["full"].hidden_states(torch.tensor([ids]))[-1][0].numpy()


@pytest.mark.parametrize("where", PADDED)
def test_served_states_are_those_of_gpt_with_a_mask_of_ones_and_not_of_its_default_mask(
    tiny_server: Served, tiny: Oracle, where: str
) -> None:
    ids = PADDED[where]
    found = states(row_of(tiny_server, ids))
    with_ones = tiny.hidden(ids, "full").numpy()  # the oracle passes a mask of ones
    np.testing.assert_allclose(found, with_ones, **TOLERANCE)
    assert np.abs(found - by_default(tiny, ids)).max() > 0.01


def test_padding_changes_a_served_row_while_gpt_s_default_hides_it(
    tiny_server: Served, tiny: Oracle
) -> None:
    """So rows are sent at their own length."""
    bare = states(row_of(tiny_server, [5, 6, 7]))
    padded = states(row_of(tiny_server, PADDED["trailing"]))
    assert np.abs(padded[:3] - bare).max() > 0.01
    np.testing.assert_allclose(by_default(tiny, PADDED["trailing"])[:3], bare, **TOLERANCE)


def test_pad_counts_in_the_mean_and_in_the_score_and_is_the_last_token(
    tiny_server: Served,
) -> None:
    row = row_of(tiny_server, PADDED["trailing"])
    assert [token["id"] for token in row["tokens"]] == PADDED["trailing"]
    np.testing.assert_allclose(row["embedding"], states(row).mean(0), **TOLERANCE)
    wrongness = [token["wrongness"] for token in row["critic"]["tokens"]]
    assert row["critic"]["score"] == pytest.approx(np.mean(wrongness), abs=1e-6)
    last = row_of(tiny_server, PADDED["trailing"], pooling="last")
    np.testing.assert_allclose(last["embedding"], states(row)[-1], **TOLERANCE)


def test_without_pad_gpt_s_default_and_the_server_agree(tiny_server: Served, tiny: Oracle) -> None:
    ids = [TINY.cls_token_id, 5, TINY.mask_token_id, 7]
    np.testing.assert_allclose(states(row_of(tiny_server, ids)), by_default(tiny, ids), **TOLERANCE)
