"""AdminWork: what administrators' requests do off the event loop, each kind in its own threads.

No kind waits in the threads of another, and within a kind the keys take turns. Requests that take
long have places besides, so that no key has more than its share under way.
"""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request

from server.fair_work import FairWork
from server.guard import key_of
from server.leaving import unless_client_leaves
from server.places import Places

P = ParamSpec("P")
T = TypeVar("T")

MOST_WAITING = 256  # short pieces of work of a key
# At a time; one key alone gets half.
VERIFICATIONS, DIFFS, LOADS, UPLOADS, DOWNLOADS = 16, 16, 128, 64, 64


class Stop:
    """Tells work in a thread that nobody waits for it any more."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self) -> None:
        self._asked.set()

    def check(self) -> None:
        """Raises ClientDisconnect once it is asked for."""
        if self._asked.is_set():
            raise ClientDisconnect


class AdminWork:
    """The threads and the places of every kind of administrators' work."""

    def __init__(self) -> None:
        self.registry = FairWork(4, "registry", MOST_WAITING)  # short reads and writes
        self.verify = FairWork(1, "verify", VERIFICATIONS)  # a file a piece
        self.diff = FairWork(1, "diff", DIFFS)
        self.uploads = FairWork(2, "upload", UPLOADS)  # a write of a part of a body a piece
        self.publish = FairWork(2, "publish", UPLOADS)
        # A conversion holds a PEFT folder and what is made of it in memory, up to three times the
        # largest adapter file: one at a time bounds that.
        self.convert = FairWork(1, "peft", UPLOADS)
        self.verifications = Places(VERIFICATIONS, "verifications")
        self.diffs = Places(DIFFS, "diffs")
        self.loads = Places(LOADS, "loads")
        self.incoming = Places(UPLOADS, "uploads")
        self.downloads = Places(DOWNLOADS, "downloads")

    async def close(self) -> None:
        """At the end of the application."""
        shared = (self.registry, self.verify, self.diff, self.uploads, self.publish, self.convert)
        await asyncio.gather(*(threads.close() for threads in shared))

    async def call(
        self, request: Request, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What the function returns, on the account of the request's key."""
        return await self.registry.run(key_of(request), partial(function, *args, **kwargs))


async def in_turn(request: Request, threads: FairWork, work: Callable[[Stop], T]) -> T:
    """What `work` returns, on the account of the request's key.

    When the client leaves, the work is dropped, or told to stop if it has begun and awaited.
    """
    stop = Stop()
    task = asyncio.ensure_future(threads.run(key_of(request), partial(work, stop)))
    try:
        return await unless_client_leaves(request, asyncio.shield(task))
    except BaseException:
        stop.ask()
        task.cancel()
        await asyncio.wait({task})
        raise
