"""Reranking in the shapes of Cohere, Jina, vLLM and text-embeddings-inference."""

from collections.abc import Iterator, Sequence

import httpx
import numpy as np
import pytest
from conftest import Served
from reference import Oracle

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32
QUERY = "To be, or not to be"
DOCUMENTS = ["abc", "that is the question", "to be", "abc", "To be, or not"]
ROUTES = ["/rerank", "/v1/rerank", "/v2/rerank"]


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client


def expected_scores(
    tiny: Oracle, adapter: str | None, query: Sequence[int], rows: Sequence[Sequence[int]]
) -> np.ndarray:
    """Cosines by the reference."""
    source = tiny.embedding(query, adapter)
    return np.array([float(source @ tiny.embedding(row, adapter)) for row in rows])


def check_ranks(found: list[tuple[int, float]], scores: np.ndarray) -> None:
    """The scores are the reference's, from the best down; equal documents keep their order."""
    np.testing.assert_allclose([s for _, s in found], [scores[i] for i, _ in found], **TOLERANCE)
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    places = [index for index, _ in found if DOCUMENTS[index] == "abc"]
    assert places == sorted(places)


def rows(tiny: Oracle, texts: Sequence[str]) -> list[list[int]]:
    return [tiny.ids(text) for text in texts]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("named", [{"model": "full"}, {"adapter": "full@1"}, {}])
def test_documents_are_ranked_by_the_reference_s_cosines(
    client: httpx.Client, tiny: Oracle, path: str, named: dict[str, str]
) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS} | named
    answer = client.post(path, json=body).json()
    scores = expected_scores(
        tiny, "full" if named else None, tiny.ids(QUERY), rows(tiny, DOCUMENTS)
    )
    found = [(entry["index"], entry["relevance_score"]) for entry in answer["results"]]
    assert sorted(index for index, _ in found) == [0, 1, 2, 3, 4]
    check_ranks(found, scores)
    assert answer["id"].startswith("rerank-")
    assert answer["usage"]["total_tokens"] == sum(len(t) for t in [QUERY, *DOCUMENTS])
    assert answer["meta"]["api_version"]["version"] == ("2" if path == "/v2/rerank" else "1")
    assert answer["model"] == (next(iter(named.values())) if named else "tiny")
    assert (answer["adapter"] or {}).get("name") == ("full" if named else None)


@pytest.mark.parametrize("path", ROUTES)
def test_texts_are_answered_with_tei_s_list(client: httpx.Client, tiny: Oracle, path: str) -> None:
    body = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": False, "truncate": None}
    answer = client.post(path, json=body | {"return_text": True, "top_n": 3}).json()
    scores = expected_scores(tiny, None, tiny.ids(QUERY), rows(tiny, DOCUMENTS))
    check_ranks([(entry["index"], entry["score"]) for entry in answer], scores)
    assert [entry["text"] for entry in answer] == [DOCUMENTS[entry["index"]] for entry in answer]
    assert len(answer) == 3
    assert set(client.post(path, json=body).json()[0]) == {"index", "score"}


def test_documents_may_be_objects_and_come_back_when_asked_for(client: httpx.Client) -> None:
    documents = ["abc", {"text": "to be", "id": 10**30, "tags": [{"a": -(2**63) - 1}, 0.1]}]
    body = {"query": {"text": QUERY}, "documents": documents, "return_documents": True}
    body |= {"rank_fields": ["text"], "user": "someone", "request_id": "r", "priority": 3}
    results = client.post("/v1/rerank", json=body).json()["results"]
    came = {entry["index"]: entry["document"] for entry in results}
    assert came == {0: {"text": "abc"}, 1: documents[1]}
    as_texts = client.post("/v1/rerank", json={"query": QUERY, "documents": ["abc", "to be"]})
    for one, other in zip(results, as_texts.json()["results"], strict=True):
        assert one["relevance_score"] == pytest.approx(other["relevance_score"], abs=1e-6)
        assert "document" not in other


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (5, 5), (100, 5), (0, 5), (None, 5)])
def test_top_n_is_the_best_so_many(client: httpx.Client, top_n: int | None, count: int) -> None:
    every = {"query": QUERY, "documents": DOCUMENTS}
    best = client.post("/rerank", json=every | {"top_n": top_n}).json()["results"]
    all_of_them = client.post("/rerank", json=every).json()["results"]
    assert [e["index"] for e in best] == [e["index"] for e in all_of_them[:count]]


def test_only_documents_are_cut_to_max_tokens_per_doc(client: httpx.Client, tiny: Oracle) -> None:
    long = "a" * 70
    body = {"query": QUERY, "documents": ["to be", long], "max_tokens_per_doc": 4}
    answer = client.post("/v2/rerank", json=body).json()
    cut = rows(tiny, ["to b", "aaaa"])
    scores = expected_scores(tiny, None, tiny.ids(QUERY), cut)
    for entry in answer["results"]:
        assert entry["relevance_score"] == pytest.approx(scores[entry["index"]], abs=2e-5)
        assert entry["truncated"]
    assert not answer["query_truncated"]
    refused = client.post("/v2/rerank", json=body | {"query": long})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "query"


def test_truncate_cuts_the_query_too_and_says_so(client: httpx.Client, tiny: Oracle) -> None:
    long = "abc" * 30
    body = {"query": long, "documents": ["to be"], "truncate": True}
    answer = client.post("/v1/rerank", json=body).json()
    scores = expected_scores(tiny, None, tiny.ids(long)[:64], rows(tiny, ["to be"]))
    assert answer["query_truncated"]
    assert answer["results"][0]["relevance_score"] == pytest.approx(scores[0], abs=2e-5)
    left = client.post("/v1/rerank", json=body | {"truncation_direction": "Left"}).json()
    scores = expected_scores(tiny, None, tiny.ids(long)[-64:], rows(tiny, ["to be"]))
    assert left["results"][0]["relevance_score"] == pytest.approx(scores[0], abs=2e-5)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"query": "a"}, 400, "validation_error", "documents"),
        ({"query": "a", "documents": ["b"], "texts": ["b"]}, 400, "validation_error", "documents"),
        ({"query": "a", "documents": []}, 400, "empty_input", "documents"),
        ({"query": "a", "documents": ["b", ""]}, 400, "empty_input", "documents[1]"),
        ({"query": "a", "documents": ["b", 5]}, 400, "validation_error", "documents[1]"),
        ({"query": "a", "documents": [{"title": "b"}]}, 400, "validation_error", "documents[0]"),
        ({"query": "a", "documents": ["b", "x" * 65]}, 400, "sequence_too_long", "documents[1]"),
        ({"query": "a", "texts": ["b", "ß"]}, 400, "untokenizable_text", "texts[1]"),
        ({"query": "", "documents": ["b"]}, 400, "empty_input", "query"),
        ({"query": "ß", "documents": ["b"]}, 400, "untokenizable_text", "query"),
        ({"query": None, "documents": ["b"]}, 400, "validation_error", "query"),
        ({"query": "a", "documents": ["b"], "top_n": -1}, 400, "validation_error", "top_n"),
        ({"query": "a", "documents": ["b"], "model": "no"}, 404, "adapter_not_found", "model"),
        ({"query": "a", "documents": ["b"] * 2049}, 413, "too_many_inputs", "documents"),
        (
            {"query": "a", "documents": ["b"], "model": "full", "adapter": "plain"},
            400,
            "validation_error",
            "adapter",
        ),
        (
            {"query": "a", "documents": ["b"], "max_chunks_per_doc": 3},
            400,
            "validation_error",
            "max_chunks_per_doc",
        ),
    ],
)
def test_a_refusal_names_the_field_at_fault(
    client: httpx.Client, body: dict, status: int, code: str, param: str
) -> None:
    answer = client.post("/v1/rerank", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert param in error["message"] or code == "adapter_not_found"


BEYOND = {
    "in a document": ("/v1/rerank", '"query": "a", "documents": [{"text": "a", "n": [-1e400]}]'),
    "in a field that is passed over": (
        "/v1/embeddings",
        '"model": "base", "input": "a", "user": X',
    ),
    "deep in one": ("/rerank", '"query": "a", "texts": ["a"], "metadata": {"a": [{"b": X}]}'),
    "in TEI's options": ("/embed", '"inputs": "a", "options": {"a": X}'),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_number_beyond_a_float_is_refused_wherever_it_stands(
    client: httpx.Client, case: str
) -> None:
    path, body = BEYOND[case]
    raw = "{" + body.replace("X", "1e400") + "}"
    answer = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "non_finite_number" in answer.text
