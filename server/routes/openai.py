"""POST /v1/embeddings and GET /v1/models: OpenAI's shapes, so that its clients work unchanged."""

import time
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from adapters.names import BASE
from server.answer_shapes.openai import EmbeddingsAnswer, Model, Models
from server.answer_size import BASE64, BINARY, JSON, Form
from server.answers import (
    Answered,
    EmbeddingForm,
    JSONAnswer,
    adapter_entry,
    data_rows,
    embedding_matrix,
    json_answer,
)
from server.binary_answers import METADATA_HEADER, OCTET_STREAM
from server.bodies import read_json
from server.building import built
from server.engine.errors import BadInput
from server.engine.job import Ask
from server.errors import RequestError
from server.guard import caller_of, may_use, patterns_of
from server.locating import Place
from server.named_path import reference_of
from server.number_formats import packed
from server.openai_schema import EmbeddingsRequest
from server.routes.documented import INFER, READ, json_body, ok, openai_errors
from server.routes.encode import check_dimensions
from server.routes.inference import answer_inputs, cut_of
from server.state import ServerState, state_of

NOT_YOURS = "token ids of another tokenizer would be answered with wrong vectors"

BYTES_OF = {"float": JSON, "base64": BASE64, "bytes_only": BINARY}  # a number, by the format
NAMING = ("adapter_not_found", "version_not_found", "adapter_damaged", "validation_error")

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post(
    "/embeddings",
    responses=openai_errors(*INFER, "token_ids_refused") | ok(EmbeddingsAnswer),
    openapi_extra=json_body(
        EmbeddingsRequest,
        texts={"model": "verses", "input": ["To be", "or not to be"]},
        base64={
            "model": "verses",
            "input": "To be",
            "encoding_format": "base64",
            "embed_dtype": "bfloat16",
            "dimensions": 64,
        },
        cut={"model": "base", "input": "To be, or not to be", "truncate_prompt_tokens": 3},
    ),
)
async def embeddings(request: Request) -> Response:
    """Pooled rows, L2-normalised; `model` is an adapter reference, the backbone's id or base.

    With encoding_format bytes_only the body is the rows' packed numbers alone.
    """
    state = state_of(request)
    body = await read_json(request, EmbeddingsRequest, state.settings.max_body_bytes)
    check_dimensions(body.dimensions, state)
    _check_tokens(body, state)
    model = reference_of(request.scope) or body.model
    if model is None:
        raise BadInput("model: it must name an adapter, the backbone or base", field="model")
    cut = cut_of(
        state,
        body.truncate,
        body.truncate_prompt_tokens,
        body.truncation_side == "left",
        "truncate_prompt_tokens",
    )
    place = Place("input", single=body.input.single, adapter="model")
    ask = Ask(frozenset({"embedding"}), state.backbone.config.pooling)
    reference = as_reference(model, state)
    sizes = Form(vector=BYTES_OF[body.encoding_format])
    answered = await answer_inputs(request, body.input, [reference], ask, place, cut, form=sizes)
    as_base64 = body.encoding_format == "base64"
    form = EmbeddingForm(body.dimensions, body.normalize, as_base64, body.embed_dtype)
    if body.encoding_format == "bytes_only":
        return await built(request, answered.size, lambda: _bytes_answer(answered, form))
    return await built(request, answered.size, lambda: _answer(request, answered, model, form))


def _check_tokens(body: EmbeddingsRequest, state: ServerState) -> None:
    """Raises RequestError for token ids where they are refused, and for tokens not to be added."""
    refuses = state.settings.openai_token_ids == "refuse"
    if refuses and not all(isinstance(item, str) for item in body.input):
        raise RequestError(
            "token_ids_refused",
            f"input: {NOT_YOURS}: send texts (LangChain: check_embedding_ctx_length=False), or "
            "allow ids with the server's setting openai_token_ids=accept",
            field="input",
            setting="openai_token_ids",
        )
    adds = state.backbone.tokenizer.backend.num_special_tokens_to_add(is_pair=False)
    if not body.add_special_tokens and adds:
        sentence = "add_special_tokens: the trunk's tokenizer always adds its own"
        raise BadInput(sentence, field="add_special_tokens")


def _answer(request: Request, answered: Answered, model: str, form: EmbeddingForm) -> Response:
    data = data_rows(
        answered,
        lambda row, result: {
            "object": "embedding",
            "embedding": None if result.embedding is None else form.sent(result.embedding),
            "truncated": row.truncated,
        },
    )
    identity = {"id": f"embd-{request.scope['state']['request_id']}", "created": int(time.time())}
    return json_answer(answered.size, identity | answered.envelope(model, data))


def _bytes_answer(answered: Answered, form: EmbeddingForm) -> Response:
    matrix = embedding_matrix(answered, form)
    metadata = {
        "shape": list(matrix.shape),
        "dtype": form.dtype,
        "adapter": adapter_entry(answered.results[0].adapter),
        "usage": answered.usage,
    }
    headers = {METADATA_HEADER: orjson.dumps(metadata).decode()}
    return Response(packed(matrix, form.dtype), media_type=OCTET_STREAM, headers=headers)


def as_reference(model: str, state: ServerState) -> str:
    """The backbone's own id always means the backbone: an adapter that was given this very name
    must not change what others' `model` means."""
    return BASE if model == state.backbone.id else model


@router.get("/models", responses=openai_errors(*READ, *NAMING) | ok(Models))
async def models(request: Request) -> Response:
    """The backbone and every adapter; below /as/ the adapter that the path names."""
    state = state_of(request)
    named = reference_of(request.scope)
    if named is not None:
        return JSONAnswer({"object": "list", "data": [_model_of(request, named)]})
    patterns = patterns_of(request) or ("*",)
    created = await state.admin.call(request, state.library.registry.creation_times, patterns)
    data = [_model(state.backbone.id, state.started)]
    data += [_model(name, at) for name, at in created.items()]
    return JSONAnswer({"object": "list", "data": data})


@router.get(
    "/models/{model:path}",
    responses=openai_errors(*READ, *NAMING) | ok(Model),
)
async def model(model: str, request: Request) -> Response:
    """An adapter by any reference, or the backbone; below /as/ the adapter that the path names."""
    return JSONAnswer(_model_of(request, reference_of(request.scope) or model))


def _model_of(request: Request, model: str) -> dict[str, Any]:
    """Raises TrunklineError for what is not there, or not for the request's key."""
    state, caller = state_of(request), caller_of(request)
    reference = as_reference(model, state)
    if reference == BASE:
        return _model(model, state.started)
    if caller is not None and not may_use(caller, reference):
        sentence = "the key may use no adapter of that name"
        raise RequestError("adapter_not_found", sentence, field="model")
    version = state.library.version(reference)
    return _model(model, version.created_at)


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "trunkline"}
