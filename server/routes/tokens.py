"""POST /tokenize and /detokenize."""

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answer_shapes.tokens import DetokenizeAnswer, TokenizeAnswer
from server.answers import JSONAnswer
from server.bodies import read_json
from server.engine.errors import BadInput, TokenOutOfRange
from server.inputs import encode_inputs, token_entries
from server.routes.documented import TOKENIZE, errors, json_body, ok
from server.schemas import DetokenizeRequest, TokenizeRequest
from server.state import ServerState, state_of

router = APIRouter(tags=["tokenizer"])


@router.post(
    "/tokenize",
    responses=errors(*TOKENIZE) | ok(TokenizeAnswer),
    openapi_extra=json_body(TokenizeRequest, texts={"inputs": ["To be", "or not to be"]}),
)
async def tokenize(request: Request) -> Response:
    """The tokens of each text: id, text, and the characters it stands for."""
    state = state_of(request)
    body = await read_json(request, TokenizeRequest, state.settings.max_body_bytes)
    if not all(isinstance(item, str) for item in body.inputs):
        raise BadInput("inputs of /tokenize are texts")
    encoded = await encode_inputs(body.inputs, state.backbone.tokenizer, None)
    data = [
        {"index": index, "tokens": token_entries(row, state.backbone.tokenizer)}
        for index, row in enumerate(encoded)
    ]
    return JSONAnswer({"object": "list", "model": state.backbone.id, "data": data})


@router.post(
    "/detokenize",
    responses=errors(*TOKENIZE) | ok(DetokenizeAnswer),
    openapi_extra=json_body(DetokenizeRequest, ids={"ids": [4243, 304]}),
)
async def detokenize(request: Request) -> Response:
    """The text of a list of ids, or the texts of a list of lists."""
    state = state_of(request)
    body = await read_json(request, DetokenizeRequest, state.settings.max_body_bytes)
    texts = [_text(ids, state) for ids in body.ids]
    return JSONAnswer({"text": texts[0] if len(texts) == 1 else None, "texts": texts})


def _text(ids: object, state: ServerState) -> str:
    if not isinstance(ids, np.ndarray):
        raise BadInput("ids of /detokenize are token ids")
    known = state.backbone.tokenizer.vocab_size
    if ids.min() < 0 or ids.max() >= known:
        raise TokenOutOfRange(f"token ids must be 0 to {known - 1}")
    return state.backbone.tokenizer.decode(ids.tolist())
