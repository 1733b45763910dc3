"""POST /rerank, /v1/rerank and /v2/rerank: documents by the cosine of their pooled rows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answer_shapes.rerank import RerankAnswers
from server.answer_size import UNSENT, Form
from server.answers import Answered, adapter_entry, json_answer
from server.bodies import declared_length, header, read_json
from server.building import built
from server.cosine import best_first, cosines
from server.engine.job import Ask, Floats
from server.inputs import Cut
from server.json_pieces import Items
from server.locating import Place
from server.named_path import reference_of
from server.rerank_schema import Documents, RerankRequest
from server.routes.documented import INFER, json_body, ok, openai_errors, tei_errors
from server.routes.inference import answer_inputs, cut_of, reference_for
from server.routes.openai import as_reference
from server.routes.tei import listed
from server.schemas import Rows
from server.state import ServerState, state_of

UNCUT = 1 << 62
BYTES_OF_A_BYTE = 5  # of a document, at most, when it is written again
EXAMPLES = {
    "documents": {
        "model": "verses",
        "query": "To be, or not to be",
        "documents": ["Whether 'tis nobler", {"text": "And God said, Let there be light"}],
        "top_n": 1,
        "return_documents": True,
    },
    "texts": {"query": "To be", "texts": ["or not to be", "that is the question"]},
}
BODY = json_body(RerankRequest, **EXAMPLES)
ANSWERS = ok(RerankAnswers)

router = APIRouter(tags=["rerank"])


@router.post("/v1/rerank", responses=openai_errors(*INFER) | ANSWERS, openapi_extra=BODY)
@router.post("/v2/rerank", responses=openai_errors(*INFER) | ANSWERS, openapi_extra=BODY)
@router.post("/rerank", responses=tei_errors(*INFER) | ANSWERS, openapi_extra=BODY)
async def rerank(request: Request) -> Response:
    """Documents or texts, best first, by the cosine of their pooled rows with the query's."""
    state = state_of(request)
    body = await read_json(request, RerankRequest, state.settings.max_body_bytes)
    rows = Rows((body.query, *body.rows))
    field = "texts" if body.documents is None else "documents"
    place = Place(field, first="query", adapter="model" if body.model else "adapter")
    ask = Ask(frozenset({"embedding"}), state.backbone.config.pooling)
    reference = _reference(request, body, state)
    cut = _cut(body, state)
    form = Form(vector=UNSENT, more=_sent_back(request, body))
    answered = await answer_inputs(
        request, rows, [reference], ask, place, cut, body.timeout_ms, form
    )
    return await built(request, answered.size, lambda: _answer(request, body, answered))


def _sent_back(request: Request, body: RerankRequest) -> int:
    """The most bytes of the documents in the answer: 1e15 comes back with all its zeros."""
    if not (body.return_documents or body.return_text):
        return 0
    limit = state_of(request).settings.max_body_bytes
    return BYTES_OF_A_BYTE * (declared_length(header(request, b"content-length")) or limit)


def _answer(request: Request, body: RerankRequest, answered: Answered) -> Response:
    scores = cosines(answered)
    order = best_first(scores)[: body.top_n or None]
    if body.texts is not None:
        ranks = _text_ranks(body.texts, scores, order, body.return_text)
        return listed(answered, Items(ranks, 4))
    assert body.documents is not None
    results = Items(_results(answered, body.documents, scores, order, body.return_documents), 4)
    backbone = state_of(request).backbone.id
    named = reference_of(request.scope) or body.model or body.adapter or backbone
    return json_answer(answered.size, _envelope(request, answered, named, results))


def _reference(request: Request, body: RerankRequest, state: ServerState) -> str | None:
    """`model` counts only where the path names no adapter."""
    if reference_of(request.scope) is not None or body.model is None:
        return reference_for(request, body.adapter)
    return as_reference(body.model, state)


def _cut(body: RerankRequest, state: ServerState) -> Cut | None:
    left = (body.truncation_side or body.truncation_direction) == "left"
    field = "truncate_prompt_tokens"
    cut = cut_of(state, body.truncate, body.truncate_prompt_tokens, left, field)
    if body.max_tokens_per_doc is None:
        return cut
    query = cut.tokens if cut else UNCUT  # the query is cut only where that was asked for
    whole = cut or cut_of(state, True, None, left, field)
    assert whole is not None
    tokens = min(whole.tokens, body.max_tokens_per_doc)
    return replace(whole, tokens=tokens, first_row=query)


def _text_ranks(
    texts: Rows, scores: Floats, order: list[int], with_text: bool
) -> Iterator[dict[str, Any]]:
    for index in order:
        text = {"text": texts[index]} if with_text else {}
        yield {"index": index, "score": float(scores[index])} | text


def _results(
    answered: Answered,
    documents: Documents,
    scores: Floats,
    order: list[int],
    with_documents: bool,
) -> Iterator[dict[str, Any]]:
    for index in order:
        result: dict[str, Any] = {"index": index, "relevance_score": float(scores[index])}
        result["truncated"] = answered.rows[index + 1].truncated  # row 0 is the query
        if with_documents:
            sent = documents.sent[index]
            document = sent if isinstance(sent, dict) else {"text": sent}
            # orjson refuses the integers beyond 64 bits that a client's own fields may have
            result["document"] = orjson.Fragment(msgspec.json.encode(document))
        yield result


def _envelope(request: Request, answered: Answered, model: str, results: Items) -> dict[str, Any]:
    """What the clients of Cohere, Jina and vLLM look for, each under its own name."""
    version = "2" if request.scope["path"].startswith("/v2/") else "1"
    return {
        "id": f"rerank-{request.scope['state']['request_id']}",
        "object": "list",
        "model": model,
        "adapter": adapter_entry(answered.results[0].adapter),
        "query_truncated": answered.rows[0].truncated,
        "results": results,
        "usage": answered.usage,
        "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1}},
        "timings_ms": answered.timings,
    }
