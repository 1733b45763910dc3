"""POST /encode: several outputs out of one forward, under one adapter or several."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model.encoder import FINAL
from server.answer_shapes.inference import EncodeAnswer
from server.answer_size import BASE64, BINARY, JSON, Form
from server.answers import Answered, EmbeddingForm, data_rows, encoded_row, json_answer
from server.binary_answers import (
    METADATA_HEADER,
    OCTET_STREAM,
    SAFETENSORS,
    octet_answer,
    safetensors_answer,
)
from server.bodies import header, read_json
from server.building import built
from server.engine.errors import BadInput
from server.engine.job import Ask
from server.routes.documented import BYTES, INFER, errors, json_body, ok
from server.routes.inference import answer
from server.schemas import EncodeRequest
from server.state import ServerState, state_of

EXAMPLES = {
    "embedding": {"adapter": "verses", "inputs": "To be, or not to be", "dimensions": 8},
    "adapters": {"adapters": ["verses", "era", "base"], "inputs": ["To be", "or not to be"]},
    "critic": {"adapter": "translators", "inputs": "God saw", "outputs": ["critic", "tokens"]},
    "masks": {
        "adapter": "scripture",
        "inputs": "Speak unto the [MASK] of Israel.",
        "outputs": ["logits"],
        "top_k": 2,
    },
    "labels": {
        "adapter": "supersense",
        "inputs": "a person who writes plays",
        "outputs": ["embedding", "labels"],
        "encoding_format": "base64",
    },
    "ids": {"inputs": [[4243, 304], [304]], "pooling": "last", "normalize": False, "layer": 2},
}

router = APIRouter(tags=["inference"])


@router.post(
    "/encode",
    responses=errors(*INFER, "critic_not_available", "classifier_not_available")
    | ok(
        EncodeAnswer,
        also={OCTET_STREAM: BYTES, SAFETENSORS: BYTES},
        headers={
            METADATA_HEADER: f"With {OCTET_STREAM}: shape, dtype, adapters and usage as JSON."
        },
    ),
    openapi_extra=json_body(EncodeRequest, **EXAMPLES),
)
async def encode(request: Request) -> Response:
    """Embeddings, token states, critic values, mask logits and labels of texts or token ids."""
    state = state_of(request)
    body = await read_json(request, EncodeRequest, state.settings.max_body_bytes)
    accept = header(request, b"accept")
    form = _embedding_form(body, state)
    if OCTET_STREAM in accept and body.outputs != ["embedding"]:
        raise BadInput(
            f"{OCTET_STREAM} carries embeddings alone: leave out other outputs", field="outputs"
        )
    answered = await answer(request, body, _ask(body, state), _form(accept, form))
    return await built(request, answered.size, lambda: _response(answered, form, accept, state))


def _form(accept: str, form: EmbeddingForm) -> Form:
    """How many bytes its numbers take."""
    if OCTET_STREAM in accept:
        return Form(vector=BINARY, in_header=True)
    if SAFETENSORS in accept:
        return Form(vector=BINARY, state=BINARY)
    return Form(vector=BASE64 if form.base64 else JSON)


def _response(answered: Answered, form: EmbeddingForm, accept: str, state: ServerState) -> Response:
    if OCTET_STREAM in accept:
        return octet_answer(answered, form)
    if SAFETENSORS in accept:
        return safetensors_answer(answered, form)
    tokenizer = state.backbone.tokenizer
    data = data_rows(answered, lambda row, result: encoded_row(row, result, form, tokenizer))
    return json_answer(answered.size, answered.envelope(state.backbone.id, data))


def _embedding_form(body: EncodeRequest, state: ServerState) -> EmbeddingForm:
    check_dimensions(body.dimensions, state)
    as_base64 = body.encoding_format == "base64"
    return EmbeddingForm(body.dimensions, body.normalize, as_base64, body.dtype)


def check_dimensions(dimensions: int | None, state: ServerState) -> None:
    """Raises BadInput for more dimensions than a row has."""
    if dimensions is not None and dimensions > state.backbone.config.n_embd:
        sentence = f"dimensions must be 1 to {state.backbone.config.n_embd}"
        raise BadInput(sentence, field="dimensions", limit=state.backbone.config.n_embd)


def _ask(body: EncodeRequest, state: ServerState) -> Ask:
    pooling = body.pooling or state.backbone.config.pooling
    layer = FINAL if body.layer is None else body.layer
    return Ask(frozenset(body.outputs), pooling, layer, body.top_k)
