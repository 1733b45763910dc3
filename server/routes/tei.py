"""The routes of text-embeddings-inference: /embed, /embed_all, /similarity, /predict and POST /."""

from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answer_shapes.tei import (
    Cosines,
    Embeddings,
    EmbeddingsOrCosines,
    Predictions,
    TokenStates,
)
from server.answer_size import UNSENT, Form
from server.answers import (
    Answered,
    EmbeddingForm,
    adapter_entry,
    embedding_matrix,
    json_answer,
    label_entries,
    refuse_errors,
)
from server.binary_answers import METADATA_HEADER
from server.bodies import read_json
from server.building import built
from server.cosine import cosines
from server.engine.job import Ask, Ids
from server.json_pieces import Items
from server.locating import Place
from server.routes.documented import INFER, json_body, ok, tei_errors
from server.routes.encode import check_dimensions
from server.routes.inference import PLAIN, answer_inputs, cut_to_block, reference_for
from server.schemas import Rows
from server.state import state_of
from server.tei_schema import (
    EmbedAllRequest,
    EmbedRequest,
    PooledRequest,
    PredictRequest,
    RootRequest,
    Sentences,
    SimilarityRequest,
    TeiRequest,
)

TRUNCATED_SHOWN = 1000  # rows in the metadata
PAIR = {"source_sentence": "To be", "sentences": ["or not to be", "Let there be light"]}

router = APIRouter(tags=["text-embeddings-inference"])


@router.post(
    "/embed",
    responses=tei_errors(*INFER) | ok(Embeddings),
    openapi_extra=json_body(
        EmbedRequest,
        texts={"inputs": ["To be", "or not to be"]},
        adapter={"inputs": "To be", "adapter": "verses", "dimensions": 8, "normalize": False},
    ),
)
async def embed(request: Request) -> Response:
    """The pooled row of every input, normalised unless `normalize` is false."""
    body = await read_json(request, EmbedRequest, state_of(request).settings.max_body_bytes)
    return await _embedded(request, body, body.inputs)


async def _embedded(request: Request, body: PooledRequest, inputs: Rows) -> Response:
    check_dimensions(body.dimensions, state_of(request))
    answered = await _answered(request, body, inputs, "embedding", Place(single=inputs.single))
    form = EmbeddingForm(body.dimensions, body.normalize)
    return await built(
        request, answered.size, lambda: listed(answered, embedding_matrix(answered, form))
    )


@router.post(
    "/embed_all",
    responses=tei_errors(*INFER) | ok(TokenStates),
    openapi_extra=json_body(EmbedAllRequest, texts={"inputs": ["To be"], "adapter": "verses"}),
)
async def embed_all(request: Request) -> Response:
    """The hidden state of every token of every input."""
    body = await read_json(request, EmbedAllRequest, state_of(request).settings.max_body_bytes)
    place = Place(single=body.inputs.single)
    answered = await _answered(request, body, body.inputs, "tokens", place)
    refuse_errors(answered)
    states = Items([result.hidden for result in answered.results])
    return await built(request, answered.size, lambda: listed(answered, states))


@router.post(
    "/similarity",
    responses=tei_errors(*INFER) | ok(Cosines),
    openapi_extra=json_body(SimilarityRequest, inputs={"inputs": PAIR}, beside=PAIR),
)
async def similarity(request: Request) -> Response:
    """The cosine of a sentence with each of the others."""
    body = await read_json(request, SimilarityRequest, state_of(request).settings.max_body_bytes)
    return await _compared(request, body, body.compared, nested=body.inputs is not None)


async def _compared(
    request: Request, body: TeiRequest, compared: Sentences, *, nested: bool
) -> Response:
    prefix = "inputs." if nested else ""
    place = Place(f"{prefix}sentences", first=f"{prefix}source_sentence")
    rows = (compared.source_sentence, *compared.sentences)
    answered = await _answered(request, body, rows, "embedding", place, Form(vector=UNSENT))
    return await built(request, answered.size, lambda: listed(answered, cosines(answered)))


@router.post(
    "/predict",
    responses=tei_errors(*INFER, "classifier_not_available") | ok(Predictions),
    openapi_extra=json_body(
        PredictRequest,
        one={"inputs": "a person who writes plays", "adapter": "supersense"},
        batch={"inputs": [["a person"], ["a place"]], "adapter": "supersense"},
    ),
)
async def predict(request: Request) -> Response:
    """The labels of the adapter's classifier, best first; for a batch, a list of them a row.

    huggingface_hub, known by its `parameters`, reads a single text's labels from such a list too.
    """
    body = await read_json(request, PredictRequest, state_of(request).settings.max_body_bytes)
    place = Place(single=body.inputs.single)
    form = Form(labels=body.top_k)
    answered = await _answered(request, body, body.inputs, "labels", place, form)
    refuse_errors(answered)
    rows = Items(label_entries(result, body.top_k) for result in answered.results)
    alone = body.inputs.single and body.parameters is None
    content = label_entries(answered.results[0], body.top_k) if alone else rows
    return await built(request, answered.size, lambda: listed(answered, content))


@router.post(
    "/",
    responses=tei_errors(*INFER) | ok(EmbeddingsOrCosines),
    openapi_extra=json_body(
        RootRequest, texts={"inputs": ["To be", "or not to be"]}, compared={"inputs": PAIR}
    ),
)
async def root(request: Request) -> Response:
    """What huggingface_hub's client sends to a bare URL: /embed, or /similarity by its fields."""
    body = await read_json(request, RootRequest, state_of(request).settings.max_body_bytes)
    compared = body.compared
    if compared is not None:
        return await _compared(request, body, compared, nested=body.inputs is not None)
    assert isinstance(body.inputs, Rows)
    return await _embedded(request, body, body.inputs)


async def _answered(
    request: Request,
    body: TeiRequest,
    rows: Sequence[str | Ids],
    output: str,
    place: Place,
    form: Form = PLAIN,
) -> Answered:
    state = state_of(request)
    left = body.truncation_direction == "left"
    cut = cut_to_block(state, left) if body.truncate else None
    reference = reference_for(request, body.adapter)
    ask = Ask(frozenset({output}), state.backbone.config.pooling)
    return await answer_inputs(request, rows, [reference], ask, place, cut, body.timeout_ms, form)


def listed(answered: Answered, content: Any) -> Response:
    """A bare list, as these clients take it: what it leaves out is in a header."""
    cut = [index for index, row in enumerate(answered.rows) if row.truncated]
    metadata = {
        "adapter": adapter_entry(answered.results[0].adapter),
        "usage": answered.usage,
        "truncated": cut[:TRUNCATED_SHOWN],
    }
    header = {METADATA_HEADER: orjson.dumps(metadata).decode()}
    return json_answer(answered.size, content, header)
