"""Building answers: small ones at once, large ones off the event loop, within bounds of memory."""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.answer_memory import COUNTED_BYTES, HELD, AnswerMemory
from server.answer_size import AnswerSize, check_size
from server.fair_work import FairWork
from server.guard import key_of
from server.logs import FACTS
from server.state import state_of

BUILDERS = 1  # one thread: each that holds the GIL makes the event loop wait for it
MOST_WAITING = 256  # answers of one key that wait to be built; their memory is counted


class Builders:
    """The memory of all answers, and the thread that builds the large ones. One of each app."""

    def __init__(self, memory_limit: int) -> None:
        self.memory = AnswerMemory(memory_limit)
        self.threads = FairWork(BUILDERS, "answer", MOST_WAITING)


def hold_answer(request: Request, size: AnswerSize) -> None:
    """Take the memory of the request's answer. Raises TooManyTokens or Overloaded.

    server.answer_memory gives it back when the request ends.
    """
    check_size(size, state_of(request).settings)
    if size.bytes >= COUNTED_BYTES:
        memory = builders_of(request).memory
        request.scope["state"][HELD] = memory.take(key_of(request), size.bytes)


async def built(request: Request, size: AnswerSize, build: Callable[[], Response]) -> Response:
    """What `build` returns; a large answer is built in a thread, by API key in turn."""
    if not size.is_large:
        return build()
    response = await builders_of(request).threads.run(key_of(request), build)
    _let_results_go(request)
    return response


def _let_results_go(request: Request) -> None:
    """The log line needs facts alone; its `facts` would keep the results while a client reads."""
    facts: dict[str, Any] = request.scope["state"][FACTS]()
    request.scope["state"][FACTS] = lambda: facts


def builders_of(request: Request) -> Builders:
    builders: Builders = request.app.state.builders
    return builders
