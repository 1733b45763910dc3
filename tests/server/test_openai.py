"""The official openai client, unchanged."""

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, Served
from hypothesis import given
from hypothesis import strategies as st
from reference import Oracle

from server.answer_size import AnswerSize
from server.answers import Answered, EmbeddingForm, data_rows
from server.engine.errors import NonFiniteResult
from server.engine.job import Result
from server.inputs import Encoded
from server.number_formats import packed, rounded
from server.openai_schema import EmbeddingsRequest

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


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def plain(tiny_server: Served) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client


def embed(client: httpx.Client, **body: object) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "full", "input": "abc"} | body)


@pytest.mark.parametrize("name", DTYPES)
def test_packed_rows_have_the_dtype_that_was_asked_for(
    plain: httpx.Client, tiny: Oracle, name: str
) -> None:
    """bytes_only and base64 hold the same numbers; /encode sends them too."""
    ids = [tiny.ids(text) for text in INPUTS]
    expected = torch.stack([tiny.embedding(row, "full") for row in ids])
    options = {"input": INPUTS, "embed_dtype": name, "endianness": "little"}
    answer = embed(plain, encoding_format="bytes_only", **options)
    assert answer.headers["content-type"] == "application/octet-stream"
    metadata = json.loads(answer.headers["x-trunkline-metadata"])
    assert (metadata["shape"], metadata["dtype"]) == ([3, TINY.n_embd], name)
    found = torch.frombuffer(bytearray(answer.content), dtype=DTYPES[name]).float()
    limits = {"rtol": 1e-4, "atol": 2e-5} if name == "float32" else {"rtol": 2**-8, "atol": 1e-4}
    torch.testing.assert_close(found.view(3, -1), expected, **limits)
    rows = embed(plain, encoding_format="base64", **options).json()["data"]
    assert b"".join(base64.b64decode(row["embedding"]) for row in rows) == answer.content
    numbers = embed(plain, encoding_format=None, **options).json()["data"]
    assert torch.equal(torch.tensor([row["embedding"] for row in numbers]), found.view(3, -1))
    own = {"adapter": "full", "inputs": INPUTS, "dtype": name}
    octets = plain.post("/encode", json=own, headers={"accept": "application/octet-stream"})
    assert octets.content == answer.content
    assert json.loads(octets.headers["x-trunkline-metadata"])["dtype"] == name
    rows = plain.post("/encode", json=own | {"encoding_format": "base64"}).json()["data"]
    assert b"".join(base64.b64decode(row["embedding"]) for row in rows) == answer.content
    tensors = plain.post("/encode", json=own, headers={"accept": "application/vnd.safetensors"})
    loaded = safetensors.torch.load(tensors.content)
    assert loaded["1.embedding"].dtype == DTYPES[name]
    assert torch.equal(loaded["1.embedding"].float(), found.view(3, -1)[1])


@given(st.lists(st.floats(width=32, min_value=-6e4, max_value=6e4), min_size=1))
def test_numbers_are_rounded_to_the_nearest(values: list[float]) -> None:
    array = np.array(values, np.float32)
    for name, dtype in DTYPES.items():
        expected = torch.tensor(array).to(dtype)
        assert rounded(array, name).tolist() == expected.float().tolist()
        assert packed(array, name) == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("name", "value"), [("float16", 7e4), ("bfloat16", 3.4e38)])
def test_a_number_that_a_dtype_cannot_hold_is_an_error_not_infinity(
    name: str, value: float
) -> None:
    for convert in (packed, rounded):
        with pytest.raises(NonFiniteResult, match=name):
            convert(np.array([1, value], np.float32), name)


def test_a_row_that_the_dtype_cannot_hold_errs_alone_and_all_of_them_are_one_error() -> None:
    def data_of(*values: float) -> list[dict[str, Any]]:
        row = Encoded(np.array([1]), None, None, False)
        results = [Result(None, np.array([value], np.float32)) for value in values]
        answered = Answered([row] * len(values), results, 0.0, 0.0, AnswerSize())
        form = EmbeddingForm(normalize=False, dtype="float16")
        return data_rows(answered, lambda _, r: {"embedding": form.sent(r.embedding).tolist()})

    held, too_large = data_of(2.0, 7e4)
    assert held["embedding"] == [2.0]
    assert too_large["error"]["code"] == "non_finite_result"
    assert too_large["error"]["details"]["row"] == 1
    with pytest.raises(NonFiniteResult, match="float16"):
        data_of(7e4, 8e4)


def test_null_is_absent_for_every_optional_field(plain: httpx.Client) -> None:
    optional = set(EmbeddingsRequest.model_fields) - {"model", "input"}
    answer = embed(plain, **dict.fromkeys(optional | set(EmbeddingsRequest.elsewhere)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == embed(plain).json()["data"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "someone"),
        ("priority", 0),
        ("request_id", "a1"),
        ("cache_salt", "salt"),
        ("metadata", {"a": "b"}),
        ("add_special_tokens", False),
        ("padding", "do_not_pad"),
        ("use_activation", True),
        ("mm_processor_kwargs", {}),
        ("truncation_side", "left"),
    ],
)
def test_a_field_of_other_servers_that_changes_nothing_is_accepted(
    plain: httpx.Client, field: str, value: object
) -> None:
    answer = embed(plain, **{field: value})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == embed(plain).json()["data"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_type", "query"),
        ("messages", [{"role": "user", "content": "a"}]),
        ("chat_template", "{{ messages }}"),
        ("pooling", "cls"),
        ("layer", 1),
        ("prompt_name", "query"),
        ("instruction", "Represent"),
        ("task", "retrieval.query"),
        ("late_chunking", True),
        ("use_activation", False),
        ("padding", "max_length"),
        ("endianness", "big"),
        ("output_dimension", 4),
    ],
)
def test_a_field_that_would_change_the_result_is_refused_by_its_name(
    plain: httpx.Client, field: str, value: object
) -> None:
    answer = embed(plain, **{field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("validation_error", field)
    assert error["message"].startswith(f"{field} is refused: ")


@pytest.mark.parametrize(
    ("options", "kept", "truncated"),
    [
        ({"truncate_prompt_tokens": 3}, lambda ids: ids[:3], True),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, lambda ids: ids[-3:], True),
        ({"truncate_prompt_tokens": -1}, lambda ids: ids[:64], True),
        ({"truncate_prompt_tokens": 64}, lambda ids: ids[:64], True),
        ({"truncate": True}, lambda ids: ids[:64], True),
    ],
)
def test_truncation_cuts_to_so_many_tokens_and_says_so(
    plain: httpx.Client, tiny: Oracle, options: dict, kept, truncated: bool
) -> None:
    text = "abcdefg" * 10
    short, long = embed(plain, input=["ab", text], **options).json()["data"]
    assert (short["truncated"], long["truncated"]) == (False, truncated)
    expected = tiny.embedding(kept(tiny.ids(text)), "full")
    np.testing.assert_allclose(long["embedding"], expected, **TOLERANCE)


@pytest.mark.parametrize("tokens", [0, 65, -2, 1.5, "3"])
def test_truncation_beyond_the_limit_is_refused(plain: httpx.Client, tokens: object) -> None:
    answer = embed(plain, truncate_prompt_tokens=tokens)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "truncate_prompt_tokens"


def test_token_ids_are_refused_with_langchain_s_setting(plain: httpx.Client) -> None:
    """Another tokenizer's ids would be answered with wrong vectors."""
    for ids in ([1, 2], [[1, 2], [3]]):
        answer = embed(plain, input=ids)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "token_ids_refused"
        assert "check_embedding_ctx_length=False" in answer.json()["error"]["message"]
    assert plain.post("/encode", json={"inputs": [1, 2]}).is_success


def test_an_answer_has_its_id_and_when_it_was_made(plain: httpx.Client) -> None:
    answer = plain.post(
        "/v1/embeddings",
        json={"model": "base", "input": "a"},
        headers={"x-request-id": "mine"},
    ).json()
    assert answer["id"] == "embd-mine"
    assert abs(answer["created"] - time.time()) < 3600


@pytest.mark.parametrize("reference", ["tiny", "base", "full", "full@1"])
def test_a_model_can_be_asked_for(client: "openai.OpenAI", reference: str) -> None:
    model = client.models.retrieve(reference)
    assert (model.id, model.object, model.owned_by) == (reference, "model", "trunkline")
    assert model.created > 0


def test_a_model_that_is_not_there_is_not_found(client: "openai.OpenAI") -> None:
    for reference in ("nobody", "acme/nobody", "full@7"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(reference)


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
    assert {model.id for model in models} >= {"tiny", "plain", "full", "classes"}
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
