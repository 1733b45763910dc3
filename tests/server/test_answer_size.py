"""An answer too large is refused before its forward; a large one holds nobody up."""

import asyncio
import threading

import numpy as np
import pytest
from conftest import TINY, Serve, Served
from starlette.responses import Response

from server.answer_size import (
    CRITIC_TOKEN,
    INLINE_VALUES,
    LIKELY_TOKEN,
    built,
    check_values,
    values_of,
)
from server.engine.errors import TooManyTokens
from server.engine.job import Ask

MASK = TINY.mask_token_id
ROWS = [np.array([1, MASK, 2, MASK]), np.array([3])]


@pytest.mark.parametrize(
    ("outputs", "top_k", "values"),
    [
        ({"embedding"}, 5, 2 * TINY.n_embd),
        ({"tokens"}, 5, 5 * TINY.n_embd),
        ({"critic"}, 5, 5 * CRITIC_TOKEN),
        ({"logits"}, 3, 2 * 3 * LIKELY_TOKEN),
        ({"logits"}, 1000, 2 * TINY.vocab_size * LIKELY_TOKEN),
        ({"embedding", "critic"}, 5, 2 * TINY.n_embd + 5 * CRITIC_TOKEN),
        ({"labels"}, 5, 0),
    ],
)
def test_values_are_those_that_were_asked_for(outputs: set[str], top_k: int, values: int) -> None:
    assert values_of(ROWS, Ask(frozenset(outputs), top_k=top_k), TINY) == values


def test_one_value_beyond_the_limit_is_refused() -> None:
    check_values(10, 10)
    with pytest.raises(TooManyTokens):
        check_values(11, 10)


def test_a_large_answer_is_built_off_the_event_loop_and_a_small_one_on_it() -> None:
    async def thread_of(values: int) -> int:
        seen: list[int] = []

        def build() -> Response:
            seen.append(threading.get_ident())
            return Response()

        await built(values, build)
        return seen[0]

    async def run() -> None:
        assert await thread_of(INLINE_VALUES) == threading.get_ident()
        assert await thread_of(INLINE_VALUES + 1) != threading.get_ident()

    asyncio.run(run())


def test_the_limit_is_told(tiny_server: Served) -> None:
    with tiny_server.client() as client:
        assert client.get("/info").json()["limits"]["max_answer_values"] == 2**24


def test_the_limit_holds_for_what_all_adapters_answer_together(tiny_backbone, serve: Serve) -> None:
    served = serve(tiny_backbone, "--max-answer-values", str(2 * 5 * TINY.n_embd))
    body = {"inputs": [1, 2, 3, 4, 5], "outputs": ["tokens"], "adapters": ["base", "base"]}
    with served.client() as client:
        assert client.post("/encode", json=body).status_code == 200
        answer = client.post("/encode", json=body | {"adapters": ["base"] * 3})
        assert answer.status_code == 413
        error = answer.json()["error"]
        assert error["code"] == "too_many_tokens"
        assert error["details"]["limit"] == 2 * 5 * TINY.n_embd
        assert client.post("/critic", json={"inputs": [1, 2, 3]}).status_code == 200


# What a text costs before its answer is made; the server takes 131,072 tokens a request.
LARGE = {
    "one text for /tokenize": ("/tokenize", {"inputs": "to be " * 200_000}),
    "many texts for /tokenize": ("/tokenize", {"inputs": ["to be " * 200] * 1000}),
    "ids for /detokenize": ("/detokenize", {"ids": [5] * 200_000}),
    "one text that is to be cut": ("/encode", {"inputs": "to be " * 200_000, "truncate": True}),
    "one of two": ("/embed", {"inputs": ["a", "to be " * 200_000], "truncate": True}),
}


@pytest.mark.parametrize("case", LARGE)
def test_more_tokens_than_a_request_may_have_are_refused(tiny_server: Served, case: str) -> None:
    path, body = LARGE[case]
    with tiny_server.client() as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 413
        assert "too_many_tokens" in answer.text
        assert "max_request_tokens is 131072" in answer.text
