"""POST /v1/embeddings and GET /v1/models: OpenAI's shapes, so that its clients work unchanged."""

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from adapters.names import BASE
from server.answers import EmbeddingForm, JSONAnswer, data_rows
from server.bodies import read_json
from server.engine.job import Ask
from server.guard import caller_of
from server.routes.documented import INFER, READ, json_body, openai_errors
from server.routes.encode import check_dimensions
from server.routes.inference import answer_inputs
from server.schemas import EmbeddingsRequest
from server.state import ServerState, state_of

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post(
    "/embeddings", responses=openai_errors(*INFER), openapi_extra=json_body(EmbeddingsRequest)
)
async def embeddings(request: Request) -> Response:
    """Pooled rows, L2-normalised; `model` is an adapter reference, the backbone's id or base."""
    state = state_of(request)
    body = await read_json(request, EmbeddingsRequest, state.settings.max_body_bytes)
    check_dimensions(body.dimensions, state)
    ask = Ask(frozenset({"embedding"}), state.backbone.config.pooling)
    answered = await answer_inputs(request, body.input, [_reference(body.model, state)], ask)
    form = EmbeddingForm(body.dimensions, base64=body.encoding_format == "base64")
    data = data_rows(
        answered,
        lambda _, result: {
            "object": "embedding",
            "embedding": None if result.embedding is None else form.sent(result.embedding),
        },
    )
    return JSONAnswer(answered.envelope(body.model, data))


def _reference(model: str, state: ServerState) -> str:
    """The backbone's own id means the backbone, unless an adapter has that very name."""
    if model == state.backbone.id and not state.library.registry.exists(model):
        return BASE
    return model


@router.get("/models", responses=openai_errors(*READ))
async def models(request: Request) -> Response:
    """The backbone and every adapter."""
    state = state_of(request)
    created = await asyncio.to_thread(state.library.registry.creation_times)
    data = [_model(state.backbone.id, state.started)]
    caller = caller_of(request)
    data += [
        _model(name, at)
        for name, at in created.items()
        if caller is None or caller.key.may_use(name)
    ]
    return JSONAnswer({"object": "list", "data": data})


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "trunkline"}
