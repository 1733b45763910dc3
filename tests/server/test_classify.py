"""POST /classify against the in-process reference."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import Served
from reference import Oracle

INPUTS = ["To be, or not to be", [1, 2, 3], "[MASK]!"]


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client


def classify(client: httpx.Client, **body) -> list[dict]:
    answer = client.post("/classify", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def assert_labels(row: dict, tiny: Oracle, item: str | list[int]) -> None:
    ids = tiny.ids(item) if isinstance(item, str) else item
    expected = tiny.label_scores(ids, row["adapter"]["name"])
    scores = [label["score"] for label in row["labels"]]
    assert {entry["label"]: entry["score"] for entry in row["labels"]} == pytest.approx(
        expected, abs=1e-5
    )
    assert scores == sorted(scores, reverse=True)


def test_different_label_sets_mix_in_one_request(client: httpx.Client, tiny: Oracle) -> None:
    rows = classify(client, adapters=["full", "classes"], inputs=INPUTS)
    assert [row["index"] for row in rows] == list(range(6))
    assert [len(row["labels"]) for row in rows] == [3, 5] * 3
    for number, row in enumerate(rows):
        assert row["adapter"]["name"] == ["full", "classes"][number % 2]
        assert_labels(row, tiny, INPUTS[number // 2])


def test_different_label_sets_mix_with_other_requests(client: httpx.Client, tiny: Oracle) -> None:
    def one(number: int) -> None:
        name, item = ["full", "classes"][number % 2], INPUTS[number % 3]
        for row in classify(client, adapter=name, inputs=[item] * 3):
            assert_labels(row, tiny, item)
        client.post("/encode", json={"inputs": "abc", "adapter": "plain"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(48)))


def test_scores_are_a_distribution(client: httpx.Client) -> None:
    for row in classify(client, adapter="classes", inputs=INPUTS):
        assert sum(label["score"] for label in row["labels"]) == pytest.approx(1, abs=1e-5)


def test_top_k_keeps_the_best(client: httpx.Client) -> None:
    body = {"adapter": "classes", "inputs": INPUTS}
    for best, every in zip(
        classify(client, **body, top_k=2), classify(client, **body), strict=True
    ):
        assert best["labels"] == every["labels"][:2]
    assert len(classify(client, adapter="classes", inputs="a", top_k=10**9)[0]["labels"]) == 5


def test_encode_s_labels_are_the_same_even_with_another_pooling(client: httpx.Client) -> None:
    """A classifier was trained on the backbone's own pooling."""
    body = {"adapter": "full", "inputs": INPUTS}
    encoded = client.post("/encode", json=body | {"outputs": ["labels"], "pooling": "cls"})
    for one, other in zip(encoded.json()["data"], classify(client, **body), strict=True):
        assert one["labels"] == other["labels"]


def test_the_classifier_reads_the_row_as_the_backbone_pools_it(
    bare_server: Served, bare: Oracle
) -> None:
    with bare_server.client() as client:
        (row,) = classify(client, adapter="classes", inputs="To be!")
    assert_labels(row, bare, "To be!")


@pytest.mark.parametrize(
    "body", [{}, {"adapter": "base"}, {"adapter": "plain"}, {"adapters": ["full", "plain"]}]
)
def test_without_a_classifier_it_is_409(client: httpx.Client, body: dict[str, object]) -> None:
    answer = client.post("/classify", json=body | {"inputs": "abc"})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "classifier_not_available"
