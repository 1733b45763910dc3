"""POST /encode: every output, every form of the answer, against the in-process reference."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from conftest import TINY, Served
from numpy.typing import ArrayLike
from reference import Oracle
from safetensors import safe_open
from safetensors.numpy import load
from torch.nn import functional as F

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32
TEXT = "To be, or [MASK] to be?"
ROWS = [
    TEXT,
    "[CLS]O, fie!",
    [5],
    [1, 2, 64, 3, 63, 62],
    "A horse! a horse! my kingdom for a horse!",
]
OCTETS, SAFETENSORS = "application/octet-stream", "application/vnd.safetensors"


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client


def encode(client: httpx.Client, headers: dict[str, str] | None = None, **body) -> httpx.Response:
    answer = client.post("/encode", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def rows_of(client: httpx.Client, **body) -> list[dict]:
    return encode(client, **body).json()["data"]


def ids_of(tiny: Oracle, item: str | list[int]) -> list[int]:
    return tiny.ids(item) if isinstance(item, str) else item


def assert_close(found: ArrayLike, expected: ArrayLike) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), **TOLERANCE)


def error_of(client: httpx.Client, status: int, **body) -> dict:
    answer = client.post("/encode", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


@pytest.mark.parametrize("adapter", [None, "base", "plain", "full", "classes"])
def test_by_default_a_row_is_its_normalised_mean(
    client: httpx.Client, tiny: Oracle, adapter: str | None
) -> None:
    rows = rows_of(client, adapter=adapter, inputs=ROWS)
    assert [row["index"] for row in rows] == list(range(len(ROWS)))
    name = None if adapter == "base" else adapter
    for item, row in zip(ROWS, rows, strict=True):
        assert_close(row["embedding"], tiny.embedding(ids_of(tiny, item), name))
        assert row["truncated"] is False
        assert set(row) == {"index", "adapter", "embedding", "truncated"}


def test_the_answer_names_model_adapter_usage_and_where_the_time_went(
    client: httpx.Client, tiny_backbone: Path
) -> None:
    answer = encode(client, adapter="plain", inputs=["abc", [1, 2]]).json()
    assert answer["object"] == "list"
    assert answer["model"] == "tiny"
    file = (tiny_backbone / "adapters" / "plain.safetensors").read_bytes()
    digest = f"sha256:{hashlib.sha256(file).hexdigest()}"
    for row in answer["data"]:
        assert row["adapter"] == {"name": "plain", "version": 1, "digest": digest}
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    timings = answer["timings_ms"]
    assert set(timings) == {"tokenize", "queue", "forward", "total"}
    assert all(value >= 0 for value in timings.values())
    assert timings["total"] >= timings["forward"] > 0


def test_the_backbone_alone_is_adapter_null(client: httpx.Client) -> None:
    for body in ({}, {"adapter": None}, {"adapter": "base"}, {"adapters": ["base"]}):
        assert rows_of(client, inputs="a", **body)[0]["adapter"] is None


@pytest.mark.parametrize("inputs", ["abc", ["abc"], [0, 1, 2], [[0, 1, 2]]])
def test_the_four_shapes_of_inputs(client: httpx.Client, tiny: Oracle, inputs: object) -> None:
    (row,) = rows_of(client, inputs=inputs)
    ids = tiny.ids("abc") if "abc" in (inputs, inputs[0]) else [0, 1, 2]
    assert_close(row["embedding"], tiny.embedding(ids))


@pytest.mark.parametrize("layer", [1, TINY.n_layer, None])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_of_any_layer(
    client: httpx.Client, tiny: Oracle, pooling: str, layer: int | None
) -> None:
    body = {"adapter": "full", "inputs": ROWS, "pooling": pooling, "normalize": False}
    rows = rows_of(client, **body, **({"layer": layer} if layer else {}))
    for item, row in zip(ROWS, rows, strict=True):
        hidden = tiny.states(ids_of(tiny, item), "full")[layer - 1 if layer else -1]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        assert_close(row["embedding"], expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_dimensions_are_cut_before_the_row_is_normalised(
    client: httpx.Client, tiny: Oracle, normalize: bool
) -> None:
    (row,) = rows_of(client, inputs=TEXT, dimensions=5, normalize=normalize)
    first = tiny.hidden(tiny.ids(TEXT)).mean(0)[:5]
    assert_close(row["embedding"], F.normalize(first, dim=0) if normalize else first)


def test_tokens_have_id_text_place_and_state(client: httpx.Client, tiny: Oracle) -> None:
    (row,) = rows_of(client, adapter="full", inputs="[CLS]O, [MASK]!", outputs=["tokens"])
    tokens = row["tokens"]
    assert [token["text"] for token in tokens] == ["[CLS]", "O", ",", " ", "[MASK]", "!"]
    places = [(token["start"], token["end"]) for token in tokens]
    assert places == [(0, 5), (5, 6), (6, 7), (7, 8), (8, 14), (14, 15)]
    ids = tiny.ids("[CLS]O, [MASK]!")
    assert [token["id"] for token in tokens] == ids
    assert_close([token["hidden"] for token in tokens], tiny.hidden(ids, "full"))


def test_tokens_of_a_layer_are_that_layer_s_states(client: httpx.Client, tiny: Oracle) -> None:
    (row,) = rows_of(client, inputs=TEXT, outputs=["tokens"], layer=1)
    assert_close([token["hidden"] for token in row["tokens"]], tiny.states(tiny.ids(TEXT))[0])


def test_tokens_of_id_inputs_have_no_place_in_a_text(client: httpx.Client) -> None:
    (row,) = rows_of(client, inputs=[TINY.cls_token_id, 1], outputs=["tokens"])
    kept = [{key: t[key] for key in ("id", "text", "start", "end")} for t in row["tokens"]]
    assert kept == [
        {"id": TINY.cls_token_id, "text": "[CLS]", "start": None, "end": None},
        {"id": 1, "text": " ", "start": None, "end": None},
    ]


def test_logits_are_the_likeliest_tokens_at_every_mask(client: httpx.Client, tiny: Oracle) -> None:
    text = "a[MASK]b[MASK]"
    (row,) = rows_of(client, adapter="plain", inputs=text, outputs=["logits"], top_k=4)
    ids = tiny.ids(text)
    logits = tiny.hidden(ids, "plain") @ tiny.gpts[None].wte.weight.detach().t()
    assert [mask["position"] for mask in row["logits"]] == [1, 3]
    for mask in row["logits"]:
        best = logits[mask["position"]].log_softmax(-1).topk(4)
        assert [token["id"] for token in mask["top"]] == best.indices.tolist()
        assert_close([token["logprob"] for token in mask["top"]], best.values)
        texts = [tiny.tokenizer.decode([i]) for i in best.indices.tolist()]
        assert [token["text"] for token in mask["top"]] == texts


def test_a_row_without_masks_has_no_logits(client: httpx.Client) -> None:
    assert rows_of(client, inputs="abc", outputs=["logits"])[0]["logits"] == []


def test_the_document_says_which_inputs_have_logits(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    outputs = schemas["EncodeRequest"]["properties"]["outputs"]
    assert "at every [MASK]" in outputs["description"]
    assert "an input without one has an empty list" in outputs["description"]
    assert all(f"{name}: " in outputs["description"] for name in outputs["items"]["enum"])
    mask = client.get("/info").json()["config"]["mask_token_id"]
    (row,) = rows_of(client, inputs=[20, mask, 21], outputs=["logits"])
    assert [entry["position"] for entry in row["logits"]] == [1]


def test_top_k_beyond_the_vocabulary_is_all_of_it(client: httpx.Client) -> None:
    (row,) = rows_of(client, inputs="[MASK]", outputs=["logits"], top_k=1000)
    assert len(row["logits"][0]["top"]) == TINY.vocab_size


def test_all_outputs_at_once_are_those_asked_for_one_by_one(client: httpx.Client) -> None:
    outputs = ["embedding", "tokens", "critic", "logits", "labels"]
    body = {"adapter": "full", "inputs": [TEXT, "[CLS]abc"], "layer": 1}
    together = rows_of(client, **body, outputs=outputs)
    for output in outputs:
        alone = rows_of(client, **body, outputs=[output])
        for one, all_ in zip(alone, together, strict=True):
            assert json.dumps(one[output]) == json.dumps(all_[output]), output


def test_layer_moves_embedding_and_tokens_and_leaves_the_heads(
    client: httpx.Client, tiny: Oracle
) -> None:
    outputs = ["critic", "labels"]
    (row,) = rows_of(client, adapter="full", inputs=TEXT, outputs=outputs, layer=1)
    ids = tiny.ids(TEXT)
    assert_close([token["logit"] for token in row["critic"]["tokens"]], tiny.critic(ids, "full"))
    assert_close(
        [label["score"] for label in row["labels"]],
        sorted(tiny.label_scores(ids, "full").values(), reverse=True),
    )


# Fan-out.


def test_fan_out_has_a_row_for_every_input_under_every_adapter_inputs_outermost(
    client: httpx.Client, tiny: Oracle
) -> None:
    adapters = ["full", "base", "plain", "full"]
    rows = rows_of(client, adapters=adapters, inputs=ROWS)
    assert [row["index"] for row in rows] == list(range(len(ROWS) * 4))
    for number, row in enumerate(rows):
        item, name = ROWS[number // 4], adapters[number % 4]
        assert (row["adapter"] or {"name": "base"})["name"] == name
        own = None if name == "base" else name
        assert_close(row["embedding"], tiny.embedding(ids_of(tiny, item), own))


def test_usage_counts_the_tokens_of_every_row(client: httpx.Client) -> None:
    answer = encode(client, adapters=["full", "plain"], inputs=["abc", "de"]).json()
    assert answer["usage"]["prompt_tokens"] == 10


def test_an_adapter_is_named_by_version_and_digest_too(client: httpx.Client) -> None:
    (row,) = rows_of(client, adapter="plain", inputs="abc")
    digest = row["adapter"]["digest"]
    references = ["plain@1", f"plain@{digest}", f"plain@{digest[:19]}"]
    for same in rows_of(client, adapters=references, inputs="abc"):
        assert same["adapter"] == row["adapter"]
        assert_close(same["embedding"], row["embedding"])


@pytest.mark.parametrize(
    ("reference", "status", "code"),
    [
        ("nobody", 404, "adapter_not_found"),
        ("plain@2", 404, "version_not_found"),
        ("plain@sha256:000000000000", 404, "version_not_found"),
        ("plain@stable", 404, "version_not_found"),
        ("plain@", 422, "validation_error"),
        ("plain@0", 422, "validation_error"),
        ("plain@sha256:00000000000", 422, "validation_error"),  # too short a prefix
        ("../plain", 422, "validation_error"),
        ("Plain", 422, "validation_error"),
        ("", 422, "validation_error"),
        ("base@1", 422, "validation_error"),
    ],
)
def test_a_reference_that_means_no_adapter(
    client: httpx.Client, reference: str, status: int, code: str
) -> None:
    assert error_of(client, status, adapter=reference, inputs="a")["code"] == code
    assert error_of(client, status, adapters=["plain", reference], inputs="a")["code"] == code


# Forms of the answer.


@pytest.mark.parametrize("options", [{}, {"dimensions": 7}, {"normalize": False}, {"layer": 1}])
def test_base64_is_the_same_little_endian_float32(
    client: httpx.Client, options: dict[str, object]
) -> None:
    body = {"adapter": "full", "inputs": ROWS} | options
    floats = rows_of(client, **body)
    for row, plain in zip(rows_of(client, **body, encoding_format="base64"), floats, strict=True):
        sent = np.frombuffer(base64.b64decode(row["embedding"], validate=True), "<f4")
        np.testing.assert_array_equal(sent, np.array(plain["embedding"], "f4"))


def test_octet_stream_is_the_rows_one_behind_the_other(client: httpx.Client) -> None:
    body = {"adapters": ["full", "base"], "inputs": ROWS, "dimensions": 6}
    answer = encode(client, {"accept": OCTETS}, **body)
    assert answer.headers["content-type"] == OCTETS
    metadata = answer.headers["x-trunkline-metadata"]
    described = json.loads(metadata)
    assert metadata == json.dumps(described, separators=(",", ":"))
    plain = encode(client, **body).json()
    assert described["shape"] == [len(ROWS) * 2, 6]
    assert described["dtype"] == "float32"
    assert described["adapters"] == [row["adapter"] for row in plain["data"]]
    assert described["usage"] == plain["usage"]
    sent = np.frombuffer(answer.content, "<f4").reshape(described["shape"])
    expected = [row["embedding"] for row in plain["data"]]
    np.testing.assert_array_equal(sent, np.array(expected, "f4"))


def test_octet_stream_with_other_outputs_is_refused(client: httpx.Client) -> None:
    for outputs in (["tokens"], ["embedding", "critic"]):
        body = {"adapter": "full", "inputs": "a", "outputs": outputs}
        answer = client.post("/encode", json=body, headers={"accept": OCTETS})
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["error"]["code"] == "validation_error"


def test_safetensors_has_every_output_of_every_row(client: httpx.Client, tmp_path: Path) -> None:
    outputs = ["embedding", "tokens", "critic", "logits", "labels"]
    body = {"adapters": ["full", "classes"], "inputs": [TEXT, "abc"], "outputs": outputs}
    answer = encode(client, {"accept": SAFETENSORS}, **body)
    assert answer.headers["content-type"] == SAFETENSORS
    tensors, plain = load(answer.content), encode(client, **body).json()
    for number, row in enumerate(plain["data"]):
        sent = {output: tensors[f"{number}.{output}"] for output in outputs}
        assert_close(sent["embedding"], row["embedding"])
        assert_close(sent["tokens"], [token["hidden"] for token in row["tokens"]])
        assert_close(sent["critic"], [token["logit"] for token in row["critic"]["tokens"]])
        tops = [[token["logprob"] for token in mask["top"]] for mask in row["logits"]]
        assert sent["logits"].shape == (len(tops), 5)
        assert_close(sent["logits"], np.array(tops).reshape(-1, 5))
        assert_close(sorted(sent["labels"])[::-1], [label["score"] for label in row["labels"]])
    path = tmp_path / "answer.safetensors"
    path.write_bytes(answer.content)
    with safe_open(path, "np") as file:
        metadata = {
            name: json.loads(value) for name, value in file.metadata().items() if name != "dtype"
        }
    assert metadata["adapters"] == [row["adapter"] for row in plain["data"]]
    assert metadata["usage"] == plain["usage"]
    assert metadata["shape"] == [4, TINY.n_embd]


@pytest.mark.parametrize("accept", ["application/json", "*/*", "text/html, */*;q=0.1"])
def test_other_accept_headers_get_json(client: httpx.Client, accept: str) -> None:
    answer = encode(client, {"accept": accept}, inputs="a")
    assert answer.headers["content-type"] == "application/json"


# Too long, and what does not fit the model.


@pytest.mark.parametrize("inputs", ["x" * 65, [3] * 65])
def test_too_long_is_refused_with_length_and_limit(client: httpx.Client, inputs: object) -> None:
    error = error_of(client, 422, inputs=inputs)
    assert error["code"] == "sequence_too_long"
    assert error["details"] == {"row": 0, "field": "inputs", "tokens": 65, "limit": 64}


def test_truncate_cuts_to_block_size_and_says_so(client: httpx.Client, tiny: Oracle) -> None:
    text = "[CLS]" + "so on and " * 20
    ids = tiny.ids(text)
    inputs = [text, "short", ids, "x" * 64]
    body = {"inputs": inputs, "truncate": True, "outputs": ["embedding", "tokens"]}
    answer = encode(client, **body).json()
    rows = answer["data"]
    assert [row["truncated"] for row in rows] == [True, False, True, False]
    assert [len(row["tokens"]) for row in rows] == [64, 5, 64, 64]
    assert answer["usage"]["prompt_tokens"] == 197
    for row in (rows[0], rows[2]):
        assert_close(row["embedding"], tiny.embedding(ids[:64]))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"layer": TINY.n_layer + 1}, "validation_error"),
        ({"dimensions": TINY.n_embd + 1}, "validation_error"),
        ({"outputs": ["labels"]}, "classifier_not_available"),
    ],
)
def test_what_the_model_does_not_have(
    client: httpx.Client, options: dict[str, object], code: str
) -> None:
    status = 409 if code == "classifier_not_available" else 422
    assert error_of(client, status, adapter="plain", inputs="a", **options)["code"] == code


# The request's id.


def test_a_sane_request_id_comes_back(client: httpx.Client) -> None:
    answer = encode(client, {"x-request-id": "job-7.b_2"}, inputs="a")
    assert answer.headers["x-request-id"] == "job-7.b_2"


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "<script>", "é"])
def test_an_insane_request_id_is_replaced(client: httpx.Client, sent: str) -> None:
    headers = [("x-request-id", sent.encode())]
    made = client.post("/encode", json={"inputs": "a"}, headers=headers).headers["x-request-id"]
    assert made != sent
    assert made.isalnum()


def test_an_error_carries_the_request_s_id_in_header_and_body(client: httpx.Client) -> None:
    answer = client.post("/encode", json={}, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"] == "mine"


# Another trunk: unshared, without biases, heads and [CLS], pooling `last`.


def test_pooling_is_the_backbone_s_own_by_default(bare_server: Served, bare: Oracle) -> None:
    with bare_server.client() as client:
        rows = rows_of(client, adapters=["base", "plain"], inputs="To be!")
    for row, name in zip(rows, (None, "plain"), strict=True):
        last = bare.hidden(bare.ids("To be!"), name)[-1]
        assert_close(row["embedding"], F.normalize(last, dim=0))


def test_a_row_that_is_not_finite_carries_its_error_and_its_batch_mates_are_served(
    bare_server: Served, bare: Oracle
) -> None:
    with bare_server.client() as client:
        body = {"adapters": ["classes", "hot"], "inputs": ["ab", "c"], "outputs": ["labels"]}
        rows = rows_of(client, **body)
        alone = error_of(client, 424, adapter="hot", inputs="ab", outputs=["labels"])
        binary = client.post("/encode", json=body, headers={"accept": SAFETENSORS})
    for row, text in zip(rows[::2], ["ab", "c"], strict=True):
        expected = bare.label_scores(bare.ids(text), "classes")
        found = {label["label"]: label["score"] for label in row["labels"]}
        assert found == pytest.approx(expected, abs=1e-5)
    for row in rows[1::2]:
        assert set(row) == {"index", "adapter", "error"}
        assert row["error"]["code"] == "non_finite_result"
    assert alone["code"] == "non_finite_result"
    assert binary.status_code == 424
    assert binary.json()["error"]["details"]["rows"] == [1, 3]


def test_every_length_under_every_adapter_in_one_request_is_the_reference(
    client: httpx.Client, tiny: Oracle
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randint(TINY.vocab_size, (length,)).tolist() for length in range(1, 65)]
    names = ["full", "plain", "base", "classes"]
    rows = rows_of(client, adapters=names, inputs=inputs)
    for number, row in enumerate(rows):
        name = names[number % 4]
        expected = tiny.embedding(inputs[number // 4], None if name == "base" else name)
        assert_close(row["embedding"], expected)


def test_octet_stream_with_more_adapters_than_a_header_holds_is_refused_with_a_sentence(
    client: httpx.Client,
) -> None:
    def tokens_run() -> str:
        lines = client.get("/metrics").text.splitlines()
        return next(line for line in lines if line.startswith("trunkline_tokens_total "))

    body, before = {"adapter": "plain", "inputs": [[1]] * 1000}, tokens_run()
    answer = client.post("/encode", json=body, headers={"accept": OCTETS})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_inputs")
    assert tokens_run() == before  # it is counted before anything is computed
    answer = client.post("/encode", json=body | {"adapter": "base"}, headers={"accept": OCTETS})
    assert len(answer.content) == 1000 * 16 * 4
