"""An error names its row, its field, its adapter and its limit, under every route and shape."""

import json
from collections.abc import Iterator

import httpx
import pytest
from conftest import Served

from server.rerank_schema import RerankRequest
from server.schemas import ClassifyRequest, CriticRequest, EncodeRequest
from server.strict_model import StrictModel
from server.tei_schema import (
    EmbedAllRequest,
    EmbedRequest,
    PredictRequest,
    RootRequest,
    SimilarityRequest,
)

# A good body of every inference route, and the field that holds its rows.
ROUTES = {
    "/encode": ({"inputs": ["a", "b"]}, "inputs"),
    "/critic": ({"inputs": ["a", "b"]}, "inputs"),
    "/classify": ({"inputs": ["a", "b"], "adapter": "full"}, "inputs"),
    "/v1/embeddings": ({"input": ["a", "b"], "model": "full"}, "input"),
    "/v1/rerank": ({"query": "a", "documents": ["a", "b"]}, "documents"),
    "/v2/rerank": ({"query": "a", "documents": ["a", "b"]}, "documents"),
    "/rerank": ({"query": "a", "texts": ["a", "b"]}, "texts"),
    "/embed": ({"inputs": ["a", "b"]}, "inputs"),
    "/embed_all": ({"inputs": ["a", "b"]}, "inputs"),
    "/similarity": ({"source_sentence": "a", "sentences": ["a", "b"]}, "sentences"),
    "/": ({"inputs": ["a", "b"]}, "inputs"),
}
SCHEMAS: dict[str, type[StrictModel]] = {
    "/encode": EncodeRequest,
    "/critic": CriticRequest,
    "/classify": ClassifyRequest,
    "/v1/rerank": RerankRequest,
    "/embed": EmbedRequest,
    "/embed_all": EmbedAllRequest,
    "/similarity": SimilarityRequest,
    "/predict": PredictRequest,
    "/": RootRequest,
}


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client


def error_of(answer: httpx.Response) -> tuple[str, str, dict]:
    """Code, sentence and details in any of the three shapes; OpenAI's has its param alone."""
    body = answer.json()
    error = body["error"]
    if isinstance(error, str):
        return body["code"], error, body["details"]
    if "param" in error:
        return error["code"], error["message"], {"field": error["param"]}
    return error["code"], error["message"], error["details"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("x" * 65, "sequence_too_long"),  # known from its length alone
        ("[CLS]" * 65, "sequence_too_long"),  # known once it is tokenised
        ("aß", "untokenizable_text"),
        ("", "empty_input"),
        (5, "validation_error"),
    ],
)
def test_a_bad_row_is_named(client: httpx.Client, path: str, bad: object, code: str) -> None:
    body, rows = ROUTES[path]
    answer = client.post(path, json=body | {rows: ["a", bad, "b"]})
    found, sentence, details = error_of(answer)
    assert found == code
    assert details["field"] == f"{rows}[1]"
    assert sentence.startswith(f"{rows}[1]: ")
    if details.keys() != {"field"}:  # all that OpenAI's shape has
        assert details["row"] == 1
    if code == "sequence_too_long":
        assert "65" in sentence
        assert "block_size is 64" in sentence
    if code == "untokenizable_text":
        assert "offset 1" in sentence


def test_every_row_of_a_fan_out_is_named_by_its_input(client: httpx.Client) -> None:
    body = {"inputs": [[1], [2], [99]], "adapters": ["full", "plain", "base"]}
    _, sentence, details = error_of(client.post("/encode", json=body))
    assert details == {"row": 2, "index": 0, "field": "inputs[2]"}
    assert sentence.startswith("inputs[2]: ")


@pytest.mark.parametrize("path", ["/encode", "/critic", "/classify"])
@pytest.mark.parametrize(
    ("adapters", "status", "field", "named"),
    [
        (["full", "nobody"], 404, "adapters[1]", "nobody"),
        (["full", "full@9"], 404, "adapters[1]", "full@9"),
        (["full", "full", "NO"], 422, "adapters[2]", None),
        (["full", "x" * 999], 422, "adapters[1]", None),
    ],
)
def test_the_adapter_of_a_fan_out_is_named(
    client: httpx.Client, path: str, adapters: list[str], status: int, field: str, named: str | None
) -> None:
    answer = client.post(path, json={"inputs": "a", "adapters": adapters})
    assert answer.status_code == status
    _, sentence, details = error_of(answer)
    assert details["field"] == field
    assert details.get("adapter") == named
    assert (named or field).partition("@")[0] in sentence
    assert "NO" not in answer.text
    assert "x" * 99 not in answer.text


def test_the_adapter_without_a_head_is_named(client: httpx.Client, bare_server: Served) -> None:
    for adapters, which in [(["full", "plain"], "plain"), (["full", "base", "full"], "base")]:
        answer = client.post("/classify", json={"inputs": "a", "adapters": adapters})
        code, sentence, details = error_of(answer)
        assert code == "classifier_not_available"
        assert sentence.startswith(f"{which}: ")
        assert (details["adapter"], details["field"]) == (which, "adapters[1]")
    with bare_server.client() as bare:
        answer = bare.post("/critic", json={"inputs": "a", "adapters": ["judge", "plain@1"]})
    code, sentence, details = error_of(answer)
    assert code == "critic_not_available"
    assert sentence.startswith("plain@1: ")
    assert (details["adapter"], details["field"]) == ("plain@1", "adapters[1]")


def test_one_request_s_error_says_nothing_of_another_s(client: httpx.Client) -> None:
    """A resolver may keep an error; where it is raised again it is told anew."""
    for field, body in [
        ("adapters[1]", {"adapters": ["full", "nobody"]}),
        ("adapter", {"adapter": "nobody"}),
        ("adapters[0]", {"adapters": ["nobody", "full"]}),
    ]:
        answer = client.post("/encode", json={"inputs": "a"} | body)
        code, sentence, details = error_of(answer)
        assert (code, details["field"]) == ("adapter_not_found", field)
        assert sentence == "no adapter is named nobody"


@pytest.mark.parametrize(("key", "field"), [("model", "adapter"), ("text", "inputs")])
def test_a_name_that_other_servers_use_points_to_ours(
    client: httpx.Client, key: str, field: str
) -> None:
    _, sentence, _ = error_of(client.post("/encode", json={"inputs": "a", key: "plain"}))
    assert sentence.startswith(f"{key} is an unknown key; the nearest known is {field};")


@pytest.mark.parametrize("path", ROUTES)
def test_an_unknown_key_is_named_where_it_is_a_plain_word(client: httpx.Client, path: str) -> None:
    body, _ = ROUTES[path]
    code, sentence, details = error_of(client.post(path, json=body | {"trunkate": True}))
    assert (code, details["field"]) == ("validation_error", "trunkate")
    assert "the nearest known is truncate;" in sentence or path in ("/v1/embeddings", "/v2/rerank")
    assert "truncate" in sentence
    for key in ("a b", "x" * 41, "é", "<script>", "a\n"):
        answer = client.post(path, json=body | {key: True})
        assert error_of(answer)[0] == "validation_error"
        assert json.dumps(key)[1:-1] not in answer.text


@pytest.mark.parametrize("path", SCHEMAS)
def test_null_is_absent_for_every_optional_field(client: httpx.Client, path: str) -> None:
    good = ROUTES[path][0] if path in ROUTES else {"inputs": "a", "adapter": "full"}
    expected = client.post(path, json=good)
    assert expected.status_code == 200
    nulls = dict.fromkeys([*SCHEMAS[path].model_fields, *SCHEMAS[path].elsewhere])
    answer = client.post(path, json=nulls | good)
    assert answer.status_code == 200, answer.text
    one, other = expected.json(), answer.json()
    if path in ("/v1/rerank",):
        one, other = one["results"], other["results"]
    elif isinstance(one, dict):
        one, other = one["data"], other["data"]
    assert other == one
    document = SCHEMAS[path].model_json_schema()
    for name, field in document["properties"].items():
        if name not in document.get("required", []):
            shape = json.dumps(field)
            assert '"null"' in shape, f"{name} may be null, and the document does not say so"


@pytest.mark.parametrize(
    ("field", "value"),
    [("outputs", ["embedding", "x"]), ("adapters", ["a", 5]), ("adapters", []), ("layer", 99)],
)
def test_a_bad_option_is_named(client: httpx.Client, field: str, value: object) -> None:
    code, sentence, details = error_of(client.post("/encode", json={"inputs": "a", field: value}))
    assert code == "validation_error"
    assert details["field"].startswith(field)
    assert field in sentence


def test_a_limit_is_named_with_its_setting(client: httpx.Client) -> None:
    for path, body in [
        ("/encode", {"inputs": ["a"] * 2049}),
        ("/encode", {"inputs": ["a"] * 1025, "adapters": ["full", "base"]}),
        ("/v1/embeddings", {"input": ["a"] * 2049, "model": "base"}),
        ("/embed", {"inputs": ["a"] * 2049}),
    ]:
        code, sentence, details = error_of(client.post(path, json=body))
        assert code == "too_many_inputs"
        assert "max_inputs" in sentence
        assert "2048" in sentence
        assert details.get("setting", "max_inputs") == "max_inputs"
    masks = {"inputs": ["[MASK]" * 64] * 300, "outputs": ["logits"], "top_k": 1000}
    code, sentence, details = error_of(client.post("/encode", json=masks))
    assert code == "too_many_tokens"
    assert "max_answer_values" in sentence
    assert (details["setting"], details["limit"]) == ("max_answer_values", 1 << 24)


def test_a_row_that_is_not_finite_is_named(bare_server: Served) -> None:
    """`hot` is an adapter whose classifier overflows."""
    with bare_server.client() as client:
        body = {"inputs": ["a", "b"], "adapters": ["classes", "hot"]}
        rows = client.post("/classify", json=body).json()["data"]
        assert [row["error"]["details"]["row"] for row in rows if "error" in row] == [1, 3]
        answer = client.post("/classify", json={"inputs": ["a", "b"], "adapter": "hot"})
        code, _, details = error_of(answer)
        assert (code, details["row"], details["field"]) == ("non_finite_result", 0, "inputs[0]")
        answer = client.post("/predict", json={"inputs": [["a"], ["b"]], "adapter": "hot"})
        assert answer.status_code == 424
        assert answer.json()["error_type"] == "Backend"
        assert answer.json()["details"]["field"] == "inputs[0]"
