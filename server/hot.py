"""HotRoutes: the short way of the inference routes."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Awaitable[Response]]

log = logging.getLogger("trunkline.access")


@dataclass(frozen=True)
class HotRoute:
    """What a scope's `route` is, for the metrics."""

    path: str
    handler: Handler


class HotRoutes:
    """Pure ASGI: a POST to one of the paths goes straight to its handler, all else to `app`.

    FastAPI's way to a handler costs several times what these handlers do. They are its routes too,
    for its document and for whatever is wrong with a method; `on_error` are its exception handlers.
    """

    def __init__(
        self, app: ASGIApp, handlers: Mapping[str, Handler], on_error: Mapping[Any, Any]
    ) -> None:
        self.app, self.on_error = app, on_error
        self.routes = {path: HotRoute(path, handler) for path, handler in handlers.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot = scope["type"] == "http" and scope["method"] == "POST"
        route = self.routes.get(scope["path"]) if hot else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive, send)
        try:
            response = await route.handler(request)
        except Exception as error:
            response = await self._answer(request, error)
        await response(scope, receive, send)

    async def _answer(self, request: Request, error: Exception) -> Response:
        kind = next(kind for kind in type(error).__mro__ if kind in self.on_error)
        if kind is Exception:
            log.exception("%s failed", request.scope["route"].path)
        response: Response = await self.on_error[kind](request, error)
        return response
