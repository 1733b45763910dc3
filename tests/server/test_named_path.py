"""/as/{reference}/-/...: every inference route under the adapter that the path names."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Serve, Served
from reference import Oracle

from server.keys import new_key
from server.named_path import NamedPath, route_path, split_path

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32
JSON = {"content-type": "application/json"}
TEXT = "To be, or not to be"


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/as/tone/-/encode", ("tone", "/encode")),
        ("/as/acme/tone@stable/-/v1/embeddings", ("acme/tone@stable", "/v1/embeddings")),
        ("/as/acme/tone@sha256:0123456789ab/-/v1/models/a/b", ("acme/tone@sha256:0123456789ab",
                                                              "/v1/models/a/b")),
        ("/as/tone/-", ("tone", "/")),
        ("/as/tone/-/", ("tone", "/")),
        ("/as/tone/-/encode/", ("tone", "/encode")),
        ("/as/tone-/-/encode", ("tone-", "/encode")),
        ("/as/tone/-/as/other/-/encode", ("tone", "/as/other/-/encode")),
        ("/as/tone/encode", None),
        ("/as/-/encode", None),
        ("/as//-/encode", None),
        ("/as/", None),
        ("/as", None),
        ("/assets/tone/-/encode", None),
        ("/encode", None),
    ],
)  # fmt: skip
def test_a_path_is_split_at_the_first_mark(path: str, parts: tuple[str, str] | None) -> None:
    named = split_path(path)
    assert named == (None if parts is None else NamedPath(*parts))
    assert route_path(path) == (path if parts is None else parts[1])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file, infer = tmp_path_factory.mktemp("named") / "keys.json", frozenset({"infer"})
    return {
        "file": str(file),
        "admin": new_key(file, "admin", scopes=frozenset({"admin", "infer"}))[1],
        "acme": new_key(file, "acme", scopes=infer, adapters=("acme/*",))[1],
    }


@pytest.fixture(scope="module")
def served(tiny_backbone: Path, serve_for_session: Serve, keys: dict[str, str]) -> Served:
    """`acme/tone` has the bytes of `full`, at version 1 and under the alias stable."""
    options = ("--dtype", "float32", "--keys", keys["file"], "--openai-token-ids", "accept")
    served = serve_for_session(tiny_backbone, *options)
    file = (tiny_backbone / "adapters" / "full.safetensors").read_bytes()
    with served.client(headers={"x-api-key": keys["admin"]}) as client:
        octets = {"content-type": "application/octet-stream"}
        assert client.put("/adapters/acme/tone", content=file, headers=octets).status_code == 201
        answer = client.put("/adapters/acme/tone/aliases/stable", json={"version": 1})
        assert answer.status_code == 200
    return served


@pytest.fixture(scope="module")
def client(served: Served, keys: dict[str, str]) -> Iterator[httpx.Client]:
    """A client whose key may use acme's adapters alone."""
    with served.client(headers={"x-api-key": keys["acme"]}) as client:
        yield client


def under(reference: str, path: str = "") -> str:
    return f"/as/{reference}/-{path}"


@pytest.mark.parametrize("reference", ["acme/tone", "acme/tone@stable", "acme%2Ftone%401"])
def test_an_embedding_is_of_the_adapter_in_the_path(
    client: httpx.Client, tiny: Oracle, reference: str
) -> None:
    expected = tiny.embedding(tiny.ids(TEXT), "full")
    openai = {"model": "gpt-anything", "input": TEXT}
    entry = client.post(under(reference, "/v1/embeddings"), json=openai).json()
    assert entry["data"][0]["adapter"]["name"] == "acme/tone"
    assert entry["model"] == reference.replace("%2F", "/").replace("%40", "@")
    vectors = [entry["data"][0]["embedding"]]
    vectors += [client.post(under(reference, "/encode"), json={"inputs": TEXT}).json()["data"][0]
                ["embedding"]]  # fmt: skip
    for path in ("", "/", "/embed", "/embed/"):
        vectors += client.post(under(reference, path), json={"inputs": TEXT}).json()
    for vector in vectors:
        np.testing.assert_allclose(vector, expected, **TOLERANCE)


def test_the_model_of_a_request_may_be_missing_where_the_path_names_the_adapter(
    client: httpx.Client,
) -> None:
    assert client.post(under("acme/tone", "/v1/embeddings"), json={"input": "a"}).is_success
    answer = client.post("/v1/embeddings", json={"input": "a"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/critic", {"inputs": "a"}),
        ("/classify", {"inputs": "a"}),
        ("/embed_all", {"inputs": "a"}),
        ("/predict", {"inputs": "a"}),
        ("/similarity", {"source_sentence": "a", "sentences": ["b"]}),
        ("", {"source_sentence": "a", "sentences": ["b"]}),
        ("/rerank", {"query": "a", "texts": ["b"], "model": "other/one"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "any model"}),
        ("/v2/rerank", {"query": "a", "documents": ["b"], "model": "any model"}),
        ("/tokenize", {"inputs": "a"}),
    ],
)
def test_every_inference_route_is_served_below_the_path(
    client: httpx.Client, path: str, body: dict
) -> None:
    answer = client.post(under("acme/tone", path), json=body)
    assert answer.status_code == 200, answer.text
    if path != "/tokenize":
        said = answer.text + answer.headers.get("x-trunkline-metadata", "")
        assert '"name":"acme/tone"' in said


def test_models_below_the_path_are_its_adapter(client: httpx.Client) -> None:
    (model,) = client.get(under("acme/tone", "/v1/models")).json()["data"]
    assert model["id"] == "acme/tone"
    assert client.get(under("acme/tone", "/v1/models/gpt-anything")).json() == model
    assert client.get(under("acme/tone", "/health")).is_success
    info = client.get(under("acme/tone", "/info")).json()
    assert info["model_type"]["classifier"]["label2id"]["label-2"] == 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/adapters"),
        ("GET", "/"),
        ("GET", ""),
        ("GET", "/metrics"),
        ("PUT", "/adapters/acme/new"),
        ("POST", "/adapters/full/load"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/openapi.json"),
    ],
)
def test_no_other_route_is_served_below_the_path(
    served: Served, keys: dict[str, str], method: str, path: str
) -> None:
    headers = {"x-api-key": keys["admin"]}
    answer = httpx.request(method, served.url + under("acme/tone", path), headers=headers)
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/encode", {"inputs": "a", "adapter": "plain"}, 422, "adapter"),
        ("/encode", {"inputs": "a", "adapters": ["acme/tone"]}, 422, "adapters"),
        ("/embed", {"inputs": "a", "adapter": "plain"}, 422, "adapter"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "adapter": "plain"}, 400, "adapter"),
    ],
)
def test_a_body_that_names_another_adapter_is_refused(
    client: httpx.Client, path: str, body: dict, status: int, field: str
) -> None:
    answer = client.post(under("acme/tone", path), json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    sentence = error if isinstance(error, str) else error["message"]
    assert sentence.startswith(f"{field}: the path names")
    if field == "adapter" and path == "/encode":
        same = body | {"adapter": "acme/tone"}
        assert client.post(under("acme/tone", path), json=same).is_success


def test_a_key_s_patterns_hold_for_the_adapter_of_the_path(client: httpx.Client) -> None:
    for path in ("/encode", "/v1/embeddings", "/embed"):
        body = {"input" if path.startswith("/v1") else "inputs": "a"}
        assert client.post(under("full", path), json=body).status_code == 403
        assert client.post(under("acme/none", path), json=body).status_code == 404
    for path in ("/v1/models", "/v1/models/full"):
        assert client.get(under("full", path)).status_code == 404
    assert client.get("/v1/models/full").status_code == 404
    assert client.get("/v1/models/acme/tone@stable").json()["id"] == "acme/tone@stable"
    assert client.get("/v1/models/acme%2Ftone").json()["id"] == "acme/tone"


def test_without_a_key_post_to_the_root_is_refused(served: Served) -> None:
    with served.client() as client:
        for path in ("/", "/embed", under("acme/tone"), under("acme/tone", "/v1/embeddings")):
            assert client.post(path, json={"inputs": "a"}).status_code == 401
        assert client.get(under("acme/tone", "/health")).is_success


def test_an_error_below_the_path_has_the_shape_of_its_route(client: httpx.Client) -> None:
    for path, status, keys_of_error in [
        ("/v1/embeddings", 415, {"message", "type", "param", "code"}),
        ("/v1/nothing", 404, {"message", "type", "param", "code"}),
        ("/encode", 415, {"code", "message", "details", "request_id"}),
    ]:
        answer = client.post(under("acme/tone", path), content=b"{")
        assert answer.status_code in (status, 403)
        assert set(answer.json()["error"]) == keys_of_error
    assert isinstance(client.post(under("acme/tone"), content=b"{").json()["error"], str)


def test_token_ids_are_accepted_under_v1_where_the_setting_says_so(
    client: httpx.Client, tiny: Oracle
) -> None:
    body = {"input": [[3, 4, 5]]}
    answer = client.post(under("acme/tone", "/v1/embeddings"), json=body).json()
    expected = tiny.embedding([3, 4, 5], "full")
    np.testing.assert_allclose(answer["data"][0]["embedding"], expected, **TOLERANCE)
