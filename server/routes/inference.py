"""The way of every inference request: tokenise, submit, wait, or notice that the client left."""

import time
from collections.abc import Sequence
from dataclasses import replace

from starlette.requests import Request

from adapters.errors import TrunklineError
from adapters.names import BASE
from adapters.validate import Manifest
from adapters.versions import Version
from server.answer_size import Form, size_of
from server.answers import Answered
from server.binary_answers import check_metadata
from server.building import hold_answer
from server.engine.admission import Row
from server.engine.errors import (
    BadInput,
    DeadlineExceeded,
    SequenceTooLong,
    TooManyInputs,
    TooManyTokens,
)
from server.engine.job import Ask, Ids, Result
from server.errors import RequestError
from server.guard import caller_of, check_adapter, key_of
from server.inputs import Cut, Encoded, Most, TokenizerThreads, encode_inputs
from server.leaving import unless_client_leaves
from server.locating import Place, located
from server.logs import FACTS
from server.named_path import reference_of
from server.schemas import InferenceRequest
from server.state import ServerState, state_of

PLAIN = Form()  # every number in JSON


async def answer(
    request: Request, body: InferenceRequest, ask: Ask, form: Form = PLAIN
) -> Answered:
    """Every input under every adapter, inputs outermost."""
    references = body.references
    named = reference_of(request.scope)
    if named is not None:
        references = [chosen(named, body.adapter, body.adapters)]
    fan_out = body.adapters is not None
    place = Place(
        single=body.inputs.single, adapter="adapters" if fan_out else "adapter", fan_out=fan_out
    )
    cut = cut_to_block(state_of(request)) if body.truncate else None
    return await answer_inputs(
        request, body.inputs, references, ask, place, cut, body.timeout_ms, form
    )


def chosen(named: str, adapter: str | None, adapters: Sequence[str] | None = None) -> str:
    """The reference that the request's path names. Raises BadInput where the body names another."""
    if adapters is not None:
        raise BadInput("adapters: the path names the adapter already", field="adapters")
    if adapter not in (None, named):
        raise BadInput("adapter: the path names another adapter", field="adapter")
    return named


def reference_for(request: Request, adapter: str | None) -> str | None:
    """The adapter of a request that can name one: the path's, else the body's."""
    named = reference_of(request.scope)
    return adapter if named is None else chosen(named, adapter)


def cut_of(
    state: ServerState, truncate: bool, tokens: int | None, left: bool, field: str
) -> Cut | None:
    """The cut of a request that may name its tokens, in `field`; -1 is the trunk's limit.

    Raises BadInput for more than that limit.
    """
    limit = state.backbone.config.block_size
    if tokens is None:
        return cut_to_block(state, left) if truncate else None
    if tokens == 0 or tokens > limit:
        sentence = f"{field}: must be 1 to block_size, {limit}, or -1 for that"
        raise BadInput(sentence, field=field, limit=limit)
    return replace(cut_to_block(state, left), tokens=limit if tokens == -1 else tokens)


def cut_to_block(state: ServerState, left: bool = False) -> Cut:
    """The cut that `truncate` means: to the trunk's limit."""
    config = state.backbone.config
    return Cut(config.block_size, left, config.cls_token_id)


def most_of_row(state: ServerState) -> Most:
    """What a text may have that is not to be cut."""
    limit, in_all = state.backbone.config.block_size, state.settings.max_request_tokens
    return Most(limit, "block_size", SequenceTooLong, in_all)


def most_of_request(state: ServerState) -> Most:
    """What any text may have: one that is to be cut is tokenised whole."""
    limit = state.settings.max_request_tokens
    return Most(limit, "max_request_tokens", TooManyTokens, limit)


async def answer_inputs(
    request: Request,
    inputs: Sequence[str | Ids],
    references: Sequence[str | None],
    ask: Ask,
    place: Place,
    cut: Cut | None = None,
    timeout_ms: int | None = None,
    form: Form = PLAIN,
) -> Answered:
    """Every input under every reference; `place` says what the request calls them in an error.

    `form` is what is sent of the results: the answer is counted, and its memory held, before they
    are computed.
    """
    state = state_of(request)
    received: float = request.scope["state"]["received"]
    _check_adapters(request, references, place)
    _check_count(len(inputs) * len(references), state)
    began = time.monotonic()
    most = most_of_request(state) if cut else most_of_row(state)
    try:
        encoded = await encoded_inputs(request, inputs, cut, most)
    except TrunklineError as error:
        raise located(error, place, references) from error
    tokenize_s = time.monotonic() - began
    if any(item.text is not None for item in encoded):
        state.metrics.tokenize_seconds.observe(tokenize_s)
    rows = [Row(item.ids, reference) for item in encoded for reference in references]
    try:
        adapters = [_manifest(state, reference, ask) for reference in references]
        if form.in_header:
            check_metadata([_version(state, reference) for reference in references], len(inputs))
    except TrunklineError as error:
        raise located(error, place, references, len(references)) from error
    backbone = state.backbone
    size = size_of(encoded, adapters, ask, form, backbone.config, backbone.tokenizer)
    hold_answer(request, size)
    timeout_s = (timeout_ms or state.settings.default_timeout_ms) / 1e3
    try:
        results = await _run(request, rows, ask, received + timeout_s)
    except TrunklineError as error:
        raise located(error, place, references, len(references)) from error
    _demand_a_result(results, place, references)
    spread = [item for item in encoded for _ in references]
    answered = Answered(spread, results, received, tokenize_s * 1e3, size)
    request.scope["state"][FACTS] = answered.facts
    return answered


async def encoded_inputs(
    request: Request, inputs: Sequence[str | Ids], cut: Cut | None, most: Most
) -> list[Encoded]:
    """`encode_inputs` on the account of the request's key."""
    tokenizer = state_of(request).backbone.tokenizer
    threads: TokenizerThreads = request.app.state.tokenizer_threads
    return await encode_inputs(inputs, tokenizer, cut, most, threads, key_of(request))


def _manifest(state: ServerState, reference: str | None, ask: Ask) -> Manifest | None:
    """What the reference's adapter changes, where the size of an answer depends on it."""
    version = _version(state, reference) if "labels" in ask.outputs else None
    return None if version is None else version.manifest


def _version(state: ServerState, reference: str | None) -> Version | None:
    """What the reference means now; None is the trunk alone."""
    if reference in (None, BASE):
        return None
    try:
        return state.library.version(reference)
    except TrunklineError as error:
        error.details["adapter"] = reference
        raise


def _demand_a_result(
    results: Sequence[Result], place: Place, references: Sequence[str | None]
) -> None:
    """Raises the first row's error where no row has a result."""
    error = results[0].error
    if error is not None and all(result.error is not None for result in results):
        first = TrunklineError(error.message, **error.details | {"row": 0})
        first.code = error.code
        raise located(first, place, references, len(references))


def _check_adapters(request: Request, references: Sequence[str | None], place: Place) -> None:
    """Raises RequestError where the request's key may not use one of these."""
    for index, reference in enumerate(references):
        try:
            check_adapter(request, reference)
        except RequestError as error:
            error.details["field"] = place.of_adapter(index)
            raise


async def _run(request: Request, rows: list[Row], ask: Ask, deadline: float) -> list[Result]:
    """The rows' results, on the key's account where there is one."""
    engine, caller = state_of(request).engine, caller_of(request)
    if caller is None:
        return await unless_client_leaves(request, engine.encode(rows, ask, deadline))
    tokens = sum(len(row.ids) for row in rows)
    caller.take_tokens(tokens)
    try:
        work = engine.encode(rows, ask, deadline, caller.key.id)
        return await unless_client_leaves(request, work)
    except DeadlineExceeded:
        raise  # they may have been run
    except TrunklineError:
        caller.give_back_tokens(tokens)
        raise


def _check_count(rows: int, state: ServerState) -> None:
    limit = state.settings.max_inputs
    if rows > limit:
        sentence = f"the request has {rows} rows; max_inputs is {limit}"
        raise TooManyInputs(sentence, limit=limit, setting="max_inputs")
