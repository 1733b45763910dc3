"""Every answer is counted in values and bytes before its forward pass; one too large is refused."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import TINY, Serve, Served, tiny_tokenizer

from adapters.validate import Manifest
from server.answer_size import (
    BINARY,
    CRITIC_TOKEN,
    JSON,
    LABEL,
    LIKELY_TOKEN,
    SCORES_OF_A_VALUE,
    AnswerSize,
    Form,
    check_size,
    size_of,
)
from server.engine.errors import TooManyTokens
from server.engine.job import Ask
from server.inputs import Encoded
from server.settings import Settings

MASK = TINY.mask_token_id
ROWS = [Encoded(np.array(ids), None, None, False) for ids in ([1, MASK, 2, MASK], [3])]
PLAIN = Form()
LABELS = tuple(f'"{i}"é\n' * 3 for i in range(40))


def size(outputs: set[str], top_k: int = 5, form: Form = PLAIN, adapters: int = 1) -> AnswerSize:
    ask = Ask(frozenset(outputs), top_k=top_k)
    manifests: Sequence[Manifest] = [Manifest(labels=LABELS)] * adapters
    return size_of(ROWS, manifests, ask, form, TINY, tiny_tokenizer())


SCORED = len(LABELS) // SCORES_OF_A_VALUE


@pytest.mark.parametrize(
    ("outputs", "top_k", "values"),
    [
        ({"embedding"}, 5, 2 * TINY.n_embd),
        ({"tokens"}, 5, 5 * TINY.n_embd),
        ({"critic"}, 5, 5 * CRITIC_TOKEN),
        ({"logits"}, 3, 2 * 3 * LIKELY_TOKEN),
        ({"logits"}, 1000, 2 * TINY.vocab_size * LIKELY_TOKEN),
        ({"embedding", "critic"}, 5, 2 * TINY.n_embd + 5 * CRITIC_TOKEN),
        ({"labels"}, 5, 2 * (len(LABELS) * LABEL + SCORED)),
    ],
)
def test_values_are_those_that_were_asked_for(outputs: set[str], top_k: int, values: int) -> None:
    assert size(outputs, top_k).values == values
    assert size(outputs, top_k, adapters=3).values == 3 * values


def test_labels_are_counted_by_their_names_and_as_many_as_are_sent() -> None:
    """Also as the text of other JSON, which safetensors' metadata has."""
    everything, three = size({"labels"}), size({"labels"}, form=Form(labels=3))
    assert everything.bytes >= 2 * len(json.dumps(orjson.dumps(LABELS).decode()))
    assert three.values == 2 * (3 * LABEL + SCORED)
    assert three.bytes < everything.bytes


def test_numbers_are_counted_as_they_are_sent() -> None:
    as_json, binary = size({"tokens"}), size({"tokens"}, form=Form(state=BINARY))
    assert as_json.bytes - binary.bytes == 5 * TINY.n_embd * (JSON - BINARY)


def test_one_value_or_byte_beyond_the_limit_is_refused() -> None:
    settings = Settings(max_answer_values=10, max_answer_bytes=1 << 16)
    check_size(AnswerSize(10, 1 << 16), settings)
    for beyond in (AnswerSize(11, 0), AnswerSize(0, (1 << 16) + 1)):
        with pytest.raises(TooManyTokens) as caught:
            check_size(beyond, settings)
        assert str(caught.value.details["setting"]) in caught.value.message


def test_the_limits_are_told(tiny_server: Served) -> None:
    with tiny_server.client() as client:
        limits = client.get("/info").json()["limits"]
        assert (limits["max_answer_values"], limits["max_answer_bytes"]) == (2**24, 160 << 20)


@pytest.fixture(scope="module")
def narrow(tiny_backbone, serve_for_session: Serve) -> Served:
    """A server whose answers may have 64 KiB, and few values."""
    limits = ("--max-answer-bytes", "65536", "--max-answer-values", "2000")
    return serve_for_session(tiny_backbone, *limits)


MASKS = [[MASK] * 2] * 40
# By what they ask for, of every kind that an answer grows by: the most that is answered.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "states": ("/encode", {"outputs": ["tokens"]}, {"inputs": [[1] * 64] * 100}),
    "states of several adapters": (
        *("/encode", {"outputs": ["tokens"], "inputs": [[1] * 5]}),
        {"adapters": ["base"] * 30},
    ),
    "likely tokens": ("/encode", {"outputs": ["logits"], "top_k": 50}, {"inputs": MASKS}),
    "all labels": (
        *("/encode", {"outputs": ["labels"], "adapter": "classes"}),
        {"inputs": [[1]] * 200},
    ),
    "labels": ("/classify", {"adapter": "classes"}, {"inputs": [[1]] * 200}),
    "predictions": ("/predict", {"adapter": "classes"}, {"inputs": [["a"]] * 200}),
    "critic": ("/critic", {}, {"inputs": [[1] * 64] * 10}),
    "every token's state": ("/embed_all", {}, {"inputs": ["a" * 60] * 10}),
    "vectors": ("/embed", {}, {"inputs": ["a"] * 200}),
    "vectors of OpenAI's": ("/v1/embeddings", {"model": "base"}, {"input": ["a"] * 200}),
    "tokens": ("/tokenize", {}, {"inputs": ["a" * 60] * 40}),
    "texts": ("/detokenize", {}, {"ids": [[1] * 1000] * 8}),
    "documents": (
        *("/rerank", {"query": "a", "return_documents": True}),
        {"documents": [{"text": "a", "more": "b" * 500}] * 100},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_beyond_the_limit_is_413_in_the_shape_of_its_path(
    narrow: Served, kind: str
) -> None:
    path, body, many = KINDS[kind]
    few = {name: value[:1] for name, value in many.items()}
    with narrow.client() as client:
        answer = client.post(path, json=body | few)
        assert answer.status_code == 200, answer.text
        answer = client.post(path, json=body | many)
        assert answer.status_code == 413
        assert "too_many_tokens" in answer.text
        assert "max_answer_" in answer.text


def test_the_labels_of_a_large_classifier_are_counted_before_they_are_scored(
    narrow: Served,
) -> None:
    """In JSON and in safetensors; a few of them are answered."""
    body = {"inputs": [[1]] * 20, "adapters": ["classes"] * 5}
    with narrow.client() as client:
        for accept in ("application/json", "application/vnd.safetensors"):
            headers = {"accept": accept}
            answer = client.post("/encode", json=body | {"outputs": ["labels"]}, headers=headers)
            assert answer.status_code == 413
        assert client.post("/classify", json=body).status_code == 413
        assert client.post("/classify", json=body | {"inputs": [[1]] * 5}).status_code == 200


# What a text costs before its answer is made; the server takes 131,072 tokens a request.
LARGE = {
    "one text for /tokenize": ("/tokenize", {"inputs": "to be " * 200_000}),
    "many texts for /tokenize": ("/tokenize", {"inputs": ["to be " * 200] * 1000}),
    "ids for /detokenize": ("/detokenize", {"ids": [5] * 200_000}),
    "one text that is to be cut": ("/encode", {"inputs": "to be " * 200_000, "truncate": True}),
    "one of two": ("/embed", {"inputs": ["a", "to be " * 200_000], "truncate": True}),
}


@pytest.mark.parametrize("case", LARGE)
def test_more_tokens_than_a_request_may_have_are_refused(tiny_server: Served, case: str) -> None:
    path, body = LARGE[case]
    with tiny_server.client() as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 413
        assert "too_many_tokens" in answer.text
        assert "max_request_tokens is 131072" in answer.text
