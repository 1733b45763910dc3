"""POST /tokenize and /detokenize."""

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from adapters.errors import TrunklineError
from server.answer_shapes.tokens import DetokenizeAnswer, TokenizeAnswer
from server.answer_size import built
from server.answers import JSONAnswer
from server.bodies import read_json
from server.engine.errors import BadInput, TokenOutOfRange
from server.inputs import check_tokens, encode_inputs, token_entries
from server.locating import Place, located
from server.routes.documented import TOKENIZE, errors, json_body, ok
from server.routes.inference import most_of_request
from server.schemas import DetokenizeRequest, TokenizeRequest
from server.state import ServerState, state_of

TOKEN_VALUES = 4  # what a token counts: its id, text and place

router = APIRouter(tags=["tokenizer"])


@router.post(
    "/tokenize",
    responses=errors(*TOKENIZE, "too_many_tokens") | ok(TokenizeAnswer),
    openapi_extra=json_body(TokenizeRequest, texts={"inputs": ["To be", "or not to be"]}),
)
async def tokenize(request: Request) -> Response:
    """The tokens of each text: id, text, and the characters it stands for."""
    state = state_of(request)
    body = await read_json(request, TokenizeRequest, state.settings.max_body_bytes)
    if not all(isinstance(item, str) for item in body.inputs):
        raise BadInput("inputs of /tokenize are texts")
    tokenizer, most = state.backbone.tokenizer, most_of_request(state)
    try:
        encoded = await encode_inputs(body.inputs, tokenizer, None, most)
    except TrunklineError as error:
        raise located(error, Place(single=body.inputs.single), ()) from error
    tokens = sum(len(row.ids) for row in encoded)
    check_tokens(tokens, state.settings.max_request_tokens)

    def answer() -> Response:
        rows = [token_entries(row, tokenizer) for row in encoded]
        data = [{"index": index, "tokens": tokens} for index, tokens in enumerate(rows)]
        return JSONAnswer({"object": "list", "model": state.backbone.id, "data": data})

    return await built(tokens * TOKEN_VALUES, answer)


@router.post(
    "/detokenize",
    responses=errors(*TOKENIZE, "too_many_tokens") | ok(DetokenizeAnswer),
    openapi_extra=json_body(DetokenizeRequest, ids={"ids": [4243, 304]}),
)
async def detokenize(request: Request) -> Response:
    """The text of a list of ids, or the texts of a list of lists."""
    state = state_of(request)
    body = await read_json(request, DetokenizeRequest, state.settings.max_body_bytes)
    tokens = sum(map(len, body.ids))
    check_tokens(tokens, state.settings.max_request_tokens)

    def answer() -> Response:
        texts = [_text(ids, state) for ids in body.ids]
        return JSONAnswer({"text": texts[0] if len(texts) == 1 else None, "texts": texts})

    return await built(tokens * TOKEN_VALUES, answer)


def _text(ids: object, state: ServerState) -> str:
    if not isinstance(ids, np.ndarray):
        raise BadInput("ids of /detokenize are token ids")
    known = state.backbone.tokenizer.vocab_size
    if ids.min() < 0 or ids.max() >= known:
        raise TokenOutOfRange(f"token ids must be 0 to {known - 1}")
    return state.backbone.tokenizer.decode(ids.tolist())
