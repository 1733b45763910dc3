"""POST /tokenize and /detokenize."""

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from adapters.errors import TrunklineError
from server.answer_shapes.tokens import DetokenizeAnswer, TokenizeAnswer
from server.answer_size import ROW, AnswerSize, size_of_tokens
from server.answers import GROUP, json_answer
from server.bodies import read_json
from server.building import built, hold_answer
from server.engine.errors import BadInput, TokenOutOfRange
from server.engine.job import Ids
from server.inputs import Encoded, check_tokens, token_entries
from server.json_pieces import Items
from server.locating import Place, located
from server.routes.documented import TOKENIZE, errors, json_body, ok
from server.routes.inference import encoded_inputs, most_of_request
from server.schemas import DetokenizeRequest, TokenizeRequest
from server.state import ServerState, state_of

router = APIRouter(tags=["tokenizer"])


@router.post(
    "/tokenize",
    responses=errors(*TOKENIZE, "too_many_tokens", "overloaded") | ok(TokenizeAnswer),
    openapi_extra=json_body(TokenizeRequest, texts={"inputs": ["To be", "or not to be"]}),
)
async def tokenize(request: Request) -> Response:
    """The tokens of each text: id, text, and the characters it stands for."""
    state = state_of(request)
    body = await read_json(request, TokenizeRequest, state.settings.max_body_bytes)
    if not all(isinstance(item, str) for item in body.inputs):
        raise BadInput("inputs of /tokenize are texts")
    try:
        encoded = await encoded_inputs(request, body.inputs, None, most_of_request(state))
    except TrunklineError as error:
        raise located(error, Place(single=body.inputs.single), ()) from error
    size = AnswerSize(0, len(encoded) * ROW)
    size = sum((size_of_tokens(row, state.backbone.tokenizer) for row in encoded), size)
    hold_answer(request, size)
    return await built(request, size, lambda: _tokens_answer(encoded, size, state))


def _tokens_answer(rows: list[Encoded], size: AnswerSize, state: ServerState) -> Response:
    data = (
        {"index": index, "tokens": Items(token_entries(row, state.backbone.tokenizer), GROUP)}
        for index, row in enumerate(rows)
    )
    return json_answer(size, {"object": "list", "model": state.backbone.id, "data": Items(data)})


@router.post(
    "/detokenize",
    responses=errors(*TOKENIZE, "too_many_tokens", "overloaded") | ok(DetokenizeAnswer),
    openapi_extra=json_body(DetokenizeRequest, ids={"ids": [4243, 304]}),
)
async def detokenize(request: Request) -> Response:
    """The text of a list of ids, or the texts of a list of lists."""
    state = state_of(request)
    body = await read_json(request, DetokenizeRequest, state.settings.max_body_bytes)
    tokens = sum(map(len, body.ids))
    check_tokens(tokens, state.settings.max_request_tokens)
    size = AnswerSize(tokens, 2 * sum(_text_bytes(ids, state) for ids in body.ids))
    hold_answer(request, size)

    def answer() -> Response:
        texts = [_text(ids, state) for ids in body.ids]
        one = texts[0] if len(texts) == 1 else None
        return json_answer(size, {"text": one, "texts": Items(texts)})

    return await built(request, size, answer)


def _text_bytes(ids: object, state: ServerState) -> int:
    """The most bytes of the text. Raises BadInput or TokenOutOfRange for what has none."""
    if not isinstance(ids, np.ndarray):
        raise BadInput("ids of /detokenize are token ids")
    known = state.backbone.tokenizer.vocab_size
    if ids.min() < 0 or ids.max() >= known:
        raise TokenOutOfRange(f"token ids must be 0 to {known - 1}")
    return state.backbone.tokenizer.most_text_bytes(ids)


def _text(ids: str | Ids, state: ServerState) -> str:
    assert isinstance(ids, np.ndarray)
    return state.backbone.tokenizer.decode(ids.tolist())
