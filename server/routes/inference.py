"""The way of every inference request: tokenise, submit, wait, or notice that the client left."""

import asyncio
import time
from collections.abc import Awaitable, Sequence

from starlette.requests import ClientDisconnect, Request

from adapters.errors import TrunklineError
from server.answer_size import check_values, values_of
from server.answers import Answered
from server.connection import CLIENT, Client
from server.engine.admission import Row
from server.engine.errors import DeadlineExceeded, TooManyInputs
from server.engine.job import Ask, Ids, Result
from server.guard import caller_of, check_adapter
from server.inputs import encode_inputs
from server.logs import FACTS
from server.schemas import InferenceRequest
from server.state import ServerState, state_of


async def answer(request: Request, body: InferenceRequest, ask: Ask) -> Answered:
    """Every input under every adapter, inputs outermost."""
    return await answer_inputs(
        request, body.inputs, body.references, ask, body.truncate, body.timeout_ms
    )


async def answer_inputs(
    request: Request,
    inputs: Sequence[str | Ids],
    references: Sequence[str | None],
    ask: Ask,
    truncate: bool = False,
    timeout_ms: int | None = None,
) -> Answered:
    for reference in references:
        check_adapter(request, reference)
    state = state_of(request)
    received: float = request.scope["state"]["received"]
    _check_count(len(inputs) * len(references), state)
    began = time.monotonic()
    block_size = state.backbone.config.block_size
    limit, most = (block_size, None) if truncate else (None, block_size)
    encoded = await encode_inputs(inputs, state.backbone.tokenizer, limit, most)
    tokenize_s = time.monotonic() - began
    if any(item.text is not None for item in encoded):
        state.metrics.tokenize_seconds.observe(tokenize_s)
    rows = [Row(item.ids, reference) for item in encoded for reference in references]
    values = values_of([row.ids for row in rows], ask, state.backbone.config)
    check_values(values, state.settings.max_answer_values)
    timeout_s = (timeout_ms or state.settings.default_timeout_ms) / 1e3
    results = await _run(request, rows, ask, received + timeout_s)
    if all(result.error is not None for result in results):
        assert results[0].error is not None
        raise results[0].error
    spread = [item for item in encoded for _ in references]
    answered = Answered(spread, results, received, tokenize_s * 1e3, values)
    request.scope["state"][FACTS] = answered.facts
    return answered


async def _run(request: Request, rows: list[Row], ask: Ask, deadline: float) -> list[Result]:
    """The rows' results, on the key's account where there is one."""
    engine, caller = state_of(request).engine, caller_of(request)
    if caller is None:
        return await _unless_client_leaves(request, engine.encode(rows, ask, deadline))
    tokens = sum(len(row.ids) for row in rows)
    caller.take_tokens(tokens)
    try:
        work = engine.encode(rows, ask, deadline, caller.key.id)
        return await _unless_client_leaves(request, work)
    except DeadlineExceeded:
        raise  # they may have been run
    except TrunklineError:
        caller.give_back_tokens(tokens)
        raise


def _check_count(rows: int, state: ServerState) -> None:
    limit = state.settings.max_inputs
    if rows > limit:
        raise TooManyInputs(f"the request has {rows} rows; the limit is {limit}", limit=limit)


async def _unless_client_leaves(request: Request, work: Awaitable[list[Result]]) -> list[Result]:
    """What `work` returns; cancelled, so that its rows are dropped, when the client has left."""
    client: Client | None = request.scope.get(CLIENT)
    if client is None:  # another server's connection than ours
        return await _while_connected(request, work)
    task = asyncio.current_task()
    assert task is not None
    client.left = task.cancel
    if client.gone:
        task.cancel()
    try:
        return await work
    except asyncio.CancelledError:
        if client.gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        client.left = None


async def _while_connected(request: Request, work: Awaitable[list[Result]]) -> list[Result]:
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_client_left(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
