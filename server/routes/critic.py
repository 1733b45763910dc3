"""POST /critic and /classify: the same job as /encode, with the answer in another shape."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answer_shapes.inference import ClassifyAnswer, CriticAnswer
from server.answer_size import Form
from server.answers import Answered, critic_row, data_rows, json_answer, label_entries
from server.bodies import read_json
from server.building import built
from server.engine.job import Ask
from server.routes.documented import INFER, errors, json_body, ok
from server.routes.inference import answer
from server.schemas import ClassifyRequest, CriticRequest
from server.state import ServerState, state_of

router = APIRouter(tags=["inference"])


@router.post(
    "/critic",
    responses=errors(*INFER, "critic_not_available") | ok(CriticAnswer),
    openapi_extra=json_body(
        CriticRequest,
        translators={
            "adapter": "translators",
            "inputs": "And God saw the light, that it was good.",
        },
        backbone={"inputs": ["To be", "or not to be"]},
    ),
)
async def critic(request: Request) -> Response:
    """How likely each token is wrong, by the critic head."""
    state = state_of(request)
    body = await read_json(request, CriticRequest, state.settings.max_body_bytes)
    answered = await answer(request, body, Ask(frozenset({"critic"})))
    return await built(request, answered.size, lambda: _critic_answer(answered, state))


def _critic_answer(answered: Answered, state: ServerState) -> Response:
    tokenizer = state.backbone.tokenizer
    data = data_rows(answered, lambda row, result: critic_row(row, result, tokenizer))
    return json_answer(answered.size, answered.envelope(state.backbone.id, data))


@router.post(
    "/classify",
    responses=errors(*INFER, "classifier_not_available") | ok(ClassifyAnswer),
    openapi_extra=json_body(
        ClassifyRequest,
        supersense={"adapter": "supersense", "inputs": "a person who writes plays", "top_k": 3},
        two_adapters={"adapters": ["supersense", "era"], "inputs": ["a person who writes plays"]},
    ),
)
async def classify(request: Request) -> Response:
    """The labels of the adapter's classifier, best first."""
    state = state_of(request)
    body = await read_json(request, ClassifyRequest, state.settings.max_body_bytes)
    ask, form = Ask(frozenset({"labels"})), Form(labels=body.top_k)
    answered = await answer(request, body, ask, form)
    return await built(request, answered.size, lambda: _labels_answer(answered, body.top_k, state))


def _labels_answer(answered: Answered, top_k: int | None, state: ServerState) -> Response:
    data = data_rows(answered, lambda _, result: {"labels": label_entries(result, top_k)})
    return json_answer(answered.size, answered.envelope(state.backbone.id, data))
