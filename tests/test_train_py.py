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
from server.keys import new_key

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
        for bad in ("acme/cut", "beta/cut"):  # and two files that can't be served
            path = folder / name / "adapters" / f"{bad}.safetensors"
            path.parent.mkdir()
            path.write_bytes(b"1234567")
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the server of `diffusion`: the file, a key for every adapter and one for acme's."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    secrets = {"file": str(file)}
    for name, adapters in (("all", ()), ("acme", ("acme/*",))):
        _, secrets[name] = new_key(file, name, scopes=frozenset({"infer"}), adapters=adapters)
    return secrets


@pytest.fixture(scope="module")
def servers(
    trunks: dict[str, Path], keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Served]]:
    """One server a trunk, started together; that of `diffusion` asks for a key."""
    logs = tmp_path_factory.mktemp("logs")
    options = {"diffusion": ("--keys", keys["file"]), "lora_training": ()}

    def start(name: str) -> Served:
        log = logs / f"{name}.log"
        return start_server(log, trunks[name], "--dtype", "float32", *options[name])

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


@pytest.fixture(scope="module")
def clients(servers: dict[str, Served], keys: dict[str, str]) -> Iterator[dict[str, httpx.Client]]:
    headers = {"x-api-key": keys["all"]}
    with (
        servers["diffusion"].client(headers=headers) as diffusion,
        servers["lora_training"].client() as lora_training,
    ):
        yield {"diffusion": diffusion, "lora_training": lora_training}


def ask(clients: dict[str, httpx.Client], name: str, **body: object) -> list[dict]:
    outputs = ["tokens", "critic"] if name == "diffusion" else ["tokens"]
    answer = clients[name].post("/encode", json={"outputs": outputs} | body)
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
def test_a_row_alone_is_the_reference(
    clients: dict[str, httpx.Client], name: str, number: int
) -> None:
    (row,) = ask(clients, name, adapter=f"ckpt_{name}", inputs=ids_of(name, number))
    assert_golden(row, name, number)


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_in_one_batch_with_rows_of_the_trunk_are_the_reference(
    clients: dict[str, httpx.Client], name: str
) -> None:
    inputs = [ids_of(name, number) for number in range(6)]
    rows = ask(clients, name, adapters=[f"ckpt_{name}", "base"], inputs=inputs)
    for number in range(6):
        assert_golden(rows[2 * number], name, number)
        assert rows[2 * number + 1]["adapter"] is None


def test_a_row_that_begins_with_cls_has_the_reference_s_sequence_score_and_no_other_has(
    clients: dict[str, httpx.Client],
) -> None:
    golden = GOLDEN["diffusion"]
    for number in range(6):
        row = clients["diffusion"].post("/critic", json=critic_of(number)).json()["data"][0]
        if number == SCORED:
            expected = golden[f"{number}.sequence_score"][0]
            np.testing.assert_allclose(row["sequence_score"], expected, rtol=0, atol=TOLERANCE)
        else:
            assert row["sequence_score"] is None


def critic_of(number: int) -> dict[str, object]:
    return {"adapter": "ckpt_diffusion", "inputs": ids_of("diffusion", number)}


def test_wrongness_is_the_calibration_table_s_value_for_the_critic_s_bucket(
    clients: dict[str, httpx.Client],
) -> None:
    entries = json.loads((FOLDER / "calibration.json").read_text())
    table = entries["out-char-diffusion/ckpt_diffusion.pt"]
    row = clients["diffusion"].post("/critic", json=critic_of(3)).json()["data"][0]
    assert row["tokens"]
    for token in row["tokens"]:
        bucket = min(int(100 / (1 + np.exp(-token["logit"]))), 99)
        assert token["wrongness"] == pytest.approx(table[bucket], abs=1e-6)


def test_without_a_critic_head_the_critic_is_refused_by_its_code(
    clients: dict[str, httpx.Client],
) -> None:
    body = {"adapter": "ckpt_lora_training", "inputs": "To be"}
    answer = clients["lora_training"].post("/critic", json=body)
    assert answer.json()["error"]["code"] == "critic_not_available"


def test_files_that_can_t_be_served_are_listed_and_the_server_is_ready(
    clients: dict[str, httpx.Client], servers: dict[str, Served]
) -> None:
    client = clients["lora_training"]
    listed = client.get("/adapters").json()
    assert [row["name"] for row in listed["data"]] == ["ckpt_lora_training"]
    assert [(row["name"], row["reason"]) for row in listed["unusable"]] == [
        ("acme/cut", "truncated"),
        ("beta/cut", "truncated"),
    ]
    assert client.get("/ready").json()["details"]["unusable"] == [
        {"file": f"{name}/cut.safetensors", "reason": "truncated"} for name in ("acme", "beta")
    ]
    assert "acme/cut.safetensors" in servers["lora_training"].log.read_text()


def test_with_keys_a_file_that_can_t_be_served_is_shown_to_those_who_may_use_its_name_alone(
    clients: dict[str, httpx.Client], keys: dict[str, str]
) -> None:
    client = clients["diffusion"]
    own = client.get("/adapters", headers={"x-api-key": keys["acme"]}).json()
    assert [row["file"] for row in own["unusable"]] == ["acme/cut.safetensors"]
    assert len(client.get("/adapters").json()["unusable"]) == 2
    assert client.get("/ready").json()["details"] == {"unusable_files": 2}  # it needs no key
