"""Checkpoints as the training script writes them: imported as they are, served, and compared.

The reference results are the training code's own (kit/train_py), through HTTP on a real port.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import KIT, Served, start_server
from safetensors.numpy import load_file

from adapters.importers import import_checkpoint

FOLDER = KIT / "train_py"
TOLERANCE = 2e-4  # max abs, float32: the kit's own
NAMES = ("diffusion", "lora_training")
GOLDEN = {name: load_file(FOLDER / f"golden_{name}.safetensors") for name in NAMES}
ROWS = [(name, number) for name in NAMES for number in range(6)]
SCORED = 4  # of diffusion: it begins with [CLS]


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("train_py")
    for name in NAMES:
        meta = FOLDER / f"meta_{name}.pkl"
        import_checkpoint(FOLDER / f"ckpt_{name}.pt", meta, folder / name)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def servers(
    trunks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Served]]:
    """One server a trunk, started together."""
    logs = tmp_path_factory.mktemp("logs")

    def start(name: str) -> Served:
        return start_server(logs / f"{name}.log", trunks[name], "--dtype", "float32")

    with ThreadPoolExecutor(2) as pool:
        starting = {name: pool.submit(start, name) for name in NAMES}
    running = [each.result() for each in starting.values() if each.exception() is None]
    try:
        yield {name: each.result() for name, each in starting.items()}
    finally:
        for served in running:
            served.process.terminate()
        for served in running:
            served.stop()


def ask(served: Served, name: str, **body: object) -> list[dict]:
    outputs = ["tokens", "critic"] if name == "diffusion" else ["tokens"]
    with served.client() as client:
        answer = client.post("/encode", json={"outputs": outputs} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def ids_of(name: str, number: int) -> list[int]:
    return GOLDEN[name][f"{number}.ids"].tolist()


def assert_golden(row: dict, name: str, number: int) -> None:
    golden = GOLDEN[name]
    assert row["adapter"]["name"] == f"ckpt_{name}"
    hidden = np.array([token["hidden"] for token in row["tokens"]])
    np.testing.assert_allclose(hidden, golden[f"{number}.hidden"], rtol=0, atol=TOLERANCE)
    assert ("critic" in row) == (name == "diffusion")
    if name == "diffusion":
        critic = np.array([token["logit"] for token in row["critic"]["tokens"]])
        np.testing.assert_allclose(critic, golden[f"{number}.critic"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_matrices_are_stored_once(trunks: dict[str, Path], name: str) -> None:
    """Also where the config of the checkpoint says nothing of sharing."""
    tensors = load_file(trunks[name] / "backbone.safetensors")
    assert {n for n in tensors if "c_attn" in n} == {"shared.attn.c_attn.weight"}
    assert json.loads((trunks[name] / "config.json").read_text())["share_main_matrices"] is True


@pytest.mark.parametrize(("name", "number"), ROWS)
def test_a_row_alone_is_the_reference(servers: dict[str, Served], name: str, number: int) -> None:
    (row,) = ask(servers[name], name, adapter=f"ckpt_{name}", inputs=ids_of(name, number))
    assert_golden(row, name, number)


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_in_one_batch_with_rows_of_the_trunk_are_the_reference(
    servers: dict[str, Served], name: str
) -> None:
    inputs = [ids_of(name, number) for number in range(6)]
    rows = ask(servers[name], name, adapters=[f"ckpt_{name}", "base"], inputs=inputs)
    for number in range(6):
        assert_golden(rows[2 * number], name, number)
        assert rows[2 * number + 1]["adapter"] is None


def test_a_row_that_begins_with_cls_has_the_reference_s_sequence_score_and_no_other_has(
    servers: dict[str, Served],
) -> None:
    golden = GOLDEN["diffusion"]
    for number in range(6):
        with servers["diffusion"].client() as client:
            row = client.post("/critic", json=critic_of(number)).json()["data"][0]
        if number == SCORED:
            expected = golden[f"{number}.sequence_score"][0]
            np.testing.assert_allclose(row["sequence_score"], expected, rtol=0, atol=TOLERANCE)
        else:
            assert row["sequence_score"] is None


def critic_of(number: int) -> dict[str, object]:
    return {"adapter": "ckpt_diffusion", "inputs": ids_of("diffusion", number)}


def test_wrongness_is_the_calibration_table_s_value_for_the_critic_s_bucket(
    servers: dict[str, Served],
) -> None:
    entries = json.loads((FOLDER / "calibration.json").read_text())
    table = entries["out-char-diffusion/ckpt_diffusion.pt"]
    with servers["diffusion"].client() as client:
        row = client.post("/critic", json=critic_of(3)).json()["data"][0]
    assert row["tokens"]
    for token in row["tokens"]:
        bucket = min(int(100 / (1 + np.exp(-token["logit"]))), 99)
        assert token["wrongness"] == pytest.approx(table[bucket], abs=1e-6)


def test_without_a_critic_head_the_critic_is_refused_by_its_code(
    servers: dict[str, Served],
) -> None:
    with httpx.Client(base_url=servers["lora_training"].url) as client:
        answer = client.post("/critic", json={"adapter": "ckpt_lora_training", "inputs": "To be"})
    assert answer.json()["error"]["code"] == "critic_not_available"
