"""The official openai client, unchanged."""

import base64
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from conftest import TINY, Served
from reference import Oracle

openai = pytest.importorskip("openai")

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32
INPUTS = ["To be, or not to be", "[MASK]!", "abc"]


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(
        base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}])  # without it: base64
@pytest.mark.parametrize("model", ["full", "plain", "base", "tiny", "full@1"])
def test_embeddings_are_the_reference_in_either_form(
    client: "openai.OpenAI", tiny: Oracle, model: str, form: dict[str, str]
) -> None:
    """`model` is an adapter, the backbone's id, or base."""
    answer = client.embeddings.create(model=model, input=INPUTS, **form)
    assert answer.model == model
    assert answer.object == "list"
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    own = None if model in ("base", "tiny") else model.partition("@")[0]
    for text, entry in zip(INPUTS, answer.data, strict=True):
        assert entry.object == "embedding"
        expected = tiny.embedding(tiny.ids(text), own)
        np.testing.assert_allclose(entry.embedding, expected, **TOLERANCE)
    assert answer.usage.prompt_tokens == sum(len(tiny.ids(text)) for text in INPUTS)


def test_base64_on_the_wire_is_base64(tiny_server: Served) -> None:
    body = {"model": "full", "input": "abc", "encoding_format": "base64"}
    with tiny_server.client() as client:
        (entry,) = client.post("/v1/embeddings", json=body).json()["data"]
    assert len(base64.b64decode(entry["embedding"], validate=True)) == 4 * TINY.n_embd


@pytest.mark.parametrize("inputs", ["abc", ["abc"]])
def test_every_shape_of_text(client: "openai.OpenAI", tiny: Oracle, inputs: object) -> None:
    (entry,) = client.embeddings.create(model="base", input=inputs, user="someone").data
    np.testing.assert_allclose(entry.embedding, tiny.embedding(tiny.ids("abc")), **TOLERANCE)


def test_dimensions(client: "openai.OpenAI", tiny: Oracle) -> None:
    (entry,) = client.embeddings.create(model="full", input="abc", dimensions=4).data
    first = tiny.hidden(tiny.ids("abc"), "full").mean(0)[:4]
    np.testing.assert_allclose(entry.embedding, first / first.norm(), **TOLERANCE)


def test_models_are_the_backbone_and_every_adapter(client: "openai.OpenAI") -> None:
    models = client.models.list().data
    assert {model.id for model in models} == {"tiny", "plain", "full", "classes"}
    assert all(model.object == "model" and model.created > 0 for model in models)
    assert all(model.owned_by == "trunkline" for model in models)


def test_an_unknown_model_is_the_client_s_not_found_error(client: "openai.OpenAI") -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.embeddings.create(model="nobody", input="abc")
    assert raised.value.status_code == 404
    assert raised.value.code == "adapter_not_found"
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id
    body = raised.value.response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "error", "code"),
    [
        ({"input": ""}, openai.BadRequestError, "empty_input"),
        ({"input": []}, openai.BadRequestError, "empty_input"),
        ({"input": "x" * 65}, openai.BadRequestError, "sequence_too_long"),
        ({"input": "ß"}, openai.BadRequestError, "untokenizable_text"),
        ({"input": [1, 2]}, openai.BadRequestError, "token_ids_refused"),
        ({"input": [[1, 2], [3]]}, openai.BadRequestError, "token_ids_refused"),
        ({"input": "a", "dimensions": 99}, openai.BadRequestError, "validation_error"),
        ({"input": "a", "model": "../x"}, openai.BadRequestError, "validation_error"),
        (
            {"input": "a", "extra_body": {"n": 1}},
            openai.BadRequestError,
            "validation_error",
        ),
        ({"input": "a", "model": "plain@7"}, openai.NotFoundError, "version_not_found"),
        ({"input": ["a"] * 2049}, openai.APIStatusError, "too_many_inputs"),
    ],
)
def test_a_refusal_is_the_client_s_own_exception_with_the_code(
    client: "openai.OpenAI", body: dict[str, object], error: type[Exception], code: str
) -> None:
    with pytest.raises(error) as raised:
        client.embeddings.create(**{"model": "base", **body})
    assert raised.value.code == code


def test_errors_of_routing_have_openai_s_shape_too(tiny_server: Served) -> None:
    with tiny_server.client() as client:
        answers: list[httpx.Response] = [
            client.get("/v1/nothing"),
            client.get("/v1/embeddings"),
            client.post("/v1/embeddings", content=b"{"),
        ]
    assert [answer.status_code for answer in answers] == [404, 405, 415]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
