"""text-embeddings-inference's routes, as its clients and huggingface_hub call them."""

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from conftest import Served
from reference import Oracle

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32
TEXTS = ["To be, or not to be", "[CLS]abc", "that is the question"]
PAIR = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/embed"])
@pytest.mark.parametrize("adapter", [None, "full"])
def test_embeddings_are_the_reference_s(
    client: httpx.Client, tiny: Oracle, path: str, adapter: str | None
) -> None:
    options = {"truncate": None, "prompt_name": None, "parameters": None}
    answer = client.post(path, json={"inputs": TEXTS, "adapter": adapter} | options)
    expected = [tiny.embedding(tiny.ids(text), adapter) for text in TEXTS]
    for vector, row in zip(answer.json(), expected, strict=True):
        np.testing.assert_allclose(vector, row, **TOLERANCE)
    (one,) = client.post(path, json={"inputs": TEXTS[0], "adapter": adapter}).json()
    np.testing.assert_allclose(one, expected[0], **TOLERANCE)


def test_normalize_and_dimensions(client: httpx.Client, tiny: Oracle) -> None:
    pooled = tiny.hidden(tiny.ids("abc")).mean(0)
    for options, expected in [
        ({"normalize": False}, pooled),
        ({"normalize": None}, pooled / pooled.norm()),
        ({"parameters": {"normalize": False, "dimensions": 4}}, pooled[:4]),
        ({"dimensions": 4}, pooled[:4] / pooled[:4].norm()),
    ]:
        (vector,) = client.post("/embed", json={"inputs": "abc"} | options).json()
        np.testing.assert_allclose(vector, expected, **TOLERANCE)


def test_embed_all_is_every_token_s_state(client: httpx.Client, tiny: Oracle) -> None:
    answer = client.post("/embed_all", json={"inputs": TEXTS, "adapter": "full"}).json()
    for states, text in zip(answer, TEXTS, strict=True):
        np.testing.assert_allclose(states, tiny.hidden(tiny.ids(text), "full"), **TOLERANCE)


@pytest.mark.parametrize("path", ["/", "/similarity"])
@pytest.mark.parametrize(
    "body", [PAIR, {"inputs": PAIR}, {"inputs": PAIR, "parameters": {"truncate": True}}]
)
def test_similarities_are_cosines_in_the_order_of_the_sentences(
    client: httpx.Client, tiny: Oracle, path: str, body: dict
) -> None:
    found = client.post(path, json=body | {"adapter": "plain"}).json()
    first, *others = [tiny.embedding(tiny.ids(text), "plain") for text in TEXTS]
    np.testing.assert_allclose(found, [float(first @ other) for other in others], **TOLERANCE)


def test_predictions_are_the_classifier_s_best_first(client: httpx.Client, tiny: Oracle) -> None:
    expected = tiny.label_scores(tiny.ids("abc"), "full")
    best = sorted(expected, key=lambda label: -expected[label])
    alone = client.post("/predict", json={"inputs": "abc", "adapter": "full"}).json()
    assert [entry["label"] for entry in alone] == best
    for entry in alone:
        assert entry["score"] == pytest.approx(expected[entry["label"]], rel=1e-4)
    batch = client.post("/predict", json={"inputs": [["abc"], ["abc"]], "adapter": "full"}).json()
    assert [[e["label"] for e in row] for row in batch] == [best, best]
    hub = {"inputs": "abc", "adapter": "full", "parameters": {"top_k": 2}}
    ((first, second),) = client.post("/predict", json=hub).json()  # huggingface_hub's own shape
    assert [first["label"], second["label"]] == best[:2]


@pytest.mark.parametrize(
    ("direction", "kept"),
    [
        ("Right", lambda ids: ids[:64]),
        ("right", lambda ids: ids[:64]),
        ("Left", lambda ids: ids[:1] + ids[-63:]),  # the first token is [CLS], which stays
    ],
)
def test_a_cut_row_is_said_to_be_and_keeps_its_cls(
    client: httpx.Client, tiny: Oracle, direction: str, kept
) -> None:
    ids = tiny.ids("[CLS]" + "abcde" * 20)
    body = {"inputs": ["abc", "[CLS]" + "abcde" * 20], "truncate": True}
    answer = client.post("/embed", json=body | {"truncation_direction": direction})
    np.testing.assert_allclose(answer.json()[1], tiny.embedding(kept(ids)), **TOLERANCE)
    assert '"truncated":[1]' in answer.headers["x-trunkline-metadata"]


def test_the_left_cut_of_a_row_without_cls_is_its_end(client: httpx.Client, tiny: Oracle) -> None:
    text = "abcde" * 20
    body = {"inputs": [text, tiny.ids(text)], "truncate": True, "truncation_direction": "left"}
    for vector in client.post("/embed", json=body).json():
        np.testing.assert_allclose(vector, tiny.embedding(tiny.ids(text)[-64:]), **TOLERANCE)


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "code", "field"),
    [
        ("/embed", {"inputs": ["a", "x" * 65]}, 413, "Validation", "sequence_too_long",
         "inputs[1]"),
        ("/embed", {"inputs": "ß"}, 422, "Tokenizer", "untokenizable_text", "inputs"),
        ("/embed", {"inputs": [[1], [10**6]]}, 422, "Tokenizer", "token_out_of_range",
         "inputs[1]"),
        ("/embed", {"inputs": ["a", ""]}, 422, "Validation", "empty_input", "inputs[1]"),
        ("/embed", {"inputs": ["a"] * 2049}, 413, "Validation", "too_many_inputs", "inputs"),
        ("/embed", {"inputs": "a", "adapter": "no"}, 404, "Validation", "adapter_not_found",
         "adapter"),
        ("/embed", {"inputs": "a", "prompt_name": "query"}, 422, "Validation",
         "validation_error", "prompt_name"),
        ("/embed", {"inputs": "a", "truncation_direction": "up"}, 422, "Validation",
         "validation_error", "truncation_direction"),
        ("/embed", {"inputs": "a", "parameters": [1]}, 422, "Validation", "validation_error",
         "parameters"),
        ("/", {"inputs": "a", "parameters": {"top_k": 2}}, 422, "Validation",
         "validation_error", "top_k"),
        ("/", {"parameters": {}}, 422, "Validation", "validation_error", "inputs"),
        ("/", {"inputs": "a"} | PAIR, 422, "Validation", "validation_error", "inputs"),
        ("/", {"inputs": {"source_sentence": "a"}}, 422, "Validation", "validation_error",
         "inputs"),
        ("/", {"inputs": {"source_sentence": "a", "sentences": ["a", ""]}}, 422, "Validation",
         "empty_input", "inputs.sentences[1]"),
        ("/similarity", {"source_sentence": "ß", "sentences": ["a"]}, 422, "Tokenizer",
         "untokenizable_text", "source_sentence"),
        ("/similarity", {"source_sentence": "a", "sentences": ["a", "x" * 65]}, 413,
         "Validation", "sequence_too_long", "sentences[1]"),
        ("/similarity", {"source_sentence": "a"}, 422, "Validation", "validation_error",
         "inputs"),
        ("/predict", {"inputs": ["a", "b"], "adapter": "full"}, 422, "Validation",
         "validation_error", "inputs"),
        ("/predict", {"inputs": [["a"], ["b", "c"]], "adapter": "full"}, 422, "Validation",
         "validation_error", "inputs[1]"),
        ("/predict", {"inputs": "a", "adapter": "full", "raw_scores": True}, 422, "Validation",
         "validation_error", "raw_scores"),
        ("/predict", {"inputs": "a", "adapter": "plain"}, 409, "Validation",
         "classifier_not_available", "adapter"),
    ],
)  # fmt: skip
def test_an_error_has_tei_s_shape_and_names_its_field(
    client: httpx.Client, path: str, body: dict, status: int, kind: str, code: str, field: str
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()
    assert isinstance(error["error"], str)
    assert (error["error_type"], error["code"]) == (kind, code)
    assert error["details"]["field"] == field
    assert field in error["error"] or field == "adapter"


def test_our_own_routes_keep_their_shapes_and_info_has_tei_s_fields_too(
    client: httpx.Client, tiny: Oracle
) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    (row,) = client.post("/tokenize", json={"inputs": "ab"}).json()["data"]
    assert [token["id"] for token in row["tokens"]] == tiny.ids("ab")
    info = client.get("/info").json()
    assert info["backbone"]["id"] == info["model_id"] == "tiny"
    assert info["max_input_length"] == info["config"]["block_size"] == 64
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
