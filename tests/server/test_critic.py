"""POST /critic against the in-process reference."""

import math
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from conftest import Served
from numpy.typing import ArrayLike
from reference import Oracle

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32
TEXT = "[CLS]To be, or not to be"


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client


def critic(client: httpx.Client, **body) -> list[dict]:
    answer = client.post("/critic", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def column(row: dict, key: str) -> list:
    return [token[key] for token in row["tokens"]]


def assert_close(found: ArrayLike, expected: ArrayLike) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), **TOLERANCE)


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_every_token_has_its_logit_by_the_adapter_s_own_head_or_the_backbone_s(
    client: httpx.Client, tiny: Oracle
) -> None:
    names = ["full", "plain", "base"]  # only `full` brings a critic
    inputs = [TEXT, [4, 64, 62], "!"]
    rows = critic(client, adapters=names, inputs=inputs)
    assert [row["index"] for row in rows] == list(range(9))
    for number, row in enumerate(rows):
        item, name = inputs[number // 3], names[number % 3]
        ids = tiny.ids(item) if isinstance(item, str) else item
        assert (row["adapter"] or {"name": "base"})["name"] == name
        assert_close(column(row, "logit"), tiny.critic(ids, None if name == "base" else name))


def test_wrongness_is_the_sigmoid_and_score_its_mean(client: httpx.Client) -> None:
    (row,) = critic(client, adapter="full", inputs=TEXT)
    wrongness = column(row, "wrongness")
    assert_close(wrongness, [sigmoid(logit) for logit in column(row, "logit")])
    assert row["score"] == pytest.approx(np.mean(wrongness), abs=1e-6)


def test_tokens_have_id_text_and_place(client: httpx.Client, tiny: Oracle) -> None:
    (row,) = critic(client, inputs="[CLS]O!")
    assert column(row, "id") == tiny.ids("[CLS]O!")
    assert column(row, "text") == ["[CLS]", "O", "!"]
    assert list(zip(column(row, "start"), column(row, "end"), strict=True)) == [
        (0, 5),
        (5, 6),
        (6, 7),
    ]
    (row,) = critic(client, inputs=[1, 2])
    assert column(row, "start") == [None, None]


def test_the_sequence_score_is_there_where_the_first_token_is_cls(
    client: httpx.Client, tiny: Oracle
) -> None:
    inputs = [TEXT, "To be", "a[CLS]", "[CLS]"]
    for name in ("full", None):
        rows = critic(client, adapter=name, inputs=inputs)
        for text, row in zip(inputs, rows, strict=True):
            if text.startswith("[CLS]"):
                expected = tiny.sequence_score(tiny.ids(text), name)
                assert row["sequence_score"] == pytest.approx(expected, abs=1e-5)
            else:
                assert row["sequence_score"] is None


def test_encode_and_critic_say_the_same(client: httpx.Client) -> None:
    body = {"adapter": "full", "inputs": [TEXT, "abc"]}
    encoded = client.post("/encode", json=body | {"outputs": ["critic"]}).json()["data"]
    for one, other in zip(encoded, critic(client, **body), strict=True):
        assert one["critic"]["score"] == other["score"]
        assert one["critic"]["sequence_score"] == other["sequence_score"]
        assert column(one["critic"], "logit") == column(other, "logit")
        assert column(one["critic"], "wrongness") == column(other, "wrongness")


def test_truncate_cuts_and_says_so(client: httpx.Client) -> None:
    (row,) = critic(client, inputs="x" * 70, truncate=True)
    assert len(row["tokens"]) == 64
    assert row["truncated"] is True
    assert client.post("/critic", json={"inputs": "x" * 70}).status_code == 422


# A backbone without a critic head, with a calibration table.


@pytest.mark.parametrize("name", ["judge", "calibrated"])
def test_an_adapter_brings_the_critic_and_the_nearest_table_is_used(
    bare_server: Served, bare: Oracle, name: str
) -> None:
    """The adapter's own table where it has one, else the backbone's: bucket floor(100 p)."""
    table = bare.sets[name].tensors.get("calibration", torch.linspace(0, 1, 100) ** 2).tolist()
    texts = ["To be, or not to be", "abcdefghijklmnopqrstuvwxyz", "[MASK][PAD]!"]
    with bare_server.client() as client:
        rows = critic(client, adapter=name, inputs=texts)
    seen = set()
    for text, row in zip(texts, rows, strict=True):
        assert_close(column(row, "logit"), bare.critic(bare.ids(text), name))
        assert row["sequence_score"] is None
        buckets = [min(math.floor(100 * sigmoid(logit)), 99) for logit in column(row, "logit")]
        assert column(row, "wrongness") == pytest.approx([table[b] for b in buckets], abs=1e-6)
        seen.update(buckets)
    assert len(seen) > 10, "too few buckets to tell one table from another"


@pytest.mark.parametrize(
    "body",
    [{}, {"adapter": "plain"}, {"adapters": ["judge", "plain"]}, {"adapters": ["judge", "base"]}],
)
def test_without_a_critic_head_it_is_409(bare_server: Served, body: dict[str, object]) -> None:
    with bare_server.client() as client:
        for path, more in (("/critic", {}), ("/encode", {"outputs": ["embedding", "critic"]})):
            answer = client.post(path, json=body | more | {"inputs": "abc"})
            assert answer.status_code == 409
            assert answer.json()["error"]["code"] == "critic_not_available"
