"""The kit's reference results, through HTTP on a real port."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import KIT, Served
from safetensors.numpy import load_file

TOLERANCE = 2e-4  # max abs, float32: the kit's own
GOLDEN = {name: load_file(KIT / f"golden_{name}.safetensors") for name in "ab"}
ROWS = [(name, number) for name in "ab" for number in range(6)]


def ids_of(name: str, number: int) -> list[int]:
    return GOLDEN[name][f"{number}.ids"].tolist()


def encode(client: httpx.Client, **body: object) -> list[dict]:
    answer = client.post("/encode", json={"outputs": ["tokens", "critic"]} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def assert_golden(row: dict, name: str, number: int) -> None:
    golden = GOLDEN[name]
    assert row["adapter"]["name"] == f"ckpt_{name}"
    hidden = np.array([token["hidden"] for token in row["tokens"]])
    critic = np.array([token["logit"] for token in row["critic"]["tokens"]])
    np.testing.assert_allclose(hidden, golden[f"{number}.hidden"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(critic, golden[f"{number}.critic"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "number"), ROWS)
def test_a_row_alone_is_the_reference(kit_server: Served, name: str, number: int) -> None:
    with kit_server.client() as client:
        (row,) = encode(client, adapter=f"ckpt_{name}", inputs=ids_of(name, number))
    assert_golden(row, name, number)


def test_both_adapters_and_base_over_all_lengths_in_one_request(kit_server: Served) -> None:
    inputs = [ids_of("a", number) for number in range(6)]
    with kit_server.client() as client:
        rows = encode(client, adapters=["ckpt_a", "base", "ckpt_b"], inputs=inputs)
    for number in range(6):
        assert_golden(rows[3 * number], "a", number)
        assert rows[3 * number + 1]["adapter"] is None
        assert_golden(rows[3 * number + 2], "b", number)


def test_sixteen_clients_at_once_each_get_their_own_reference(kit_server: Served) -> None:
    def one_client(seed: int) -> None:
        order = random.Random(seed)
        with kit_server.client() as client:
            for _ in range(12):
                name, number = order.choice(ROWS)
                if order.random() < 0.3:
                    encode(client, inputs=[[1, 2, 3]] * order.randint(1, 5))
                (row,) = encode(client, adapter=f"ckpt_{name}", inputs=ids_of(name, number))
                assert_golden(row, name, number)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one_client, range(16)))


def test_mask_logits_are_the_log_softmax_of_the_row_s_own_state(
    kit_server: Served, kit_backbone: Path
) -> None:
    wte = load_file(kit_backbone / "backbone.safetensors")["transformer.wte.weight"]
    with kit_server.client() as client:
        body = {"adapter": "ckpt_a", "inputs": "To be or not to b[MASK]", "top_k": 68}
        (row,) = encode(client, **body, outputs=["logits", "tokens"])
    (mask,) = row["logits"]
    assert mask["position"] == 17
    logits = wte @ np.array(row["tokens"][17]["hidden"])
    expected = logits - np.log(np.exp(logits).sum())
    sent = {token["id"]: token["logprob"] for token in mask["top"]}
    np.testing.assert_allclose([sent[i] for i in range(68)], expected, atol=1e-4)
    logprobs = [token["logprob"] for token in mask["top"]]
    assert logprobs == sorted(logprobs, reverse=True)
