"""A request's work ends when its client leaves."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from server.connection import CLIENT, Client

T = TypeVar("T")


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """What `work` returns; it is cancelled when the client has left.

    Raises ClientDisconnect then. The request's body must have been received.
    """
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


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
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
