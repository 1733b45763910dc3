"""What a running server has: made once by the app, read by the routes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from adapters.library import Library
from model.checkpoint import Backbone
from server.admin_work import AdminWork
from server.engine.engine import Engine
from server.engine.forward import Forward
from server.metrics import Metrics
from server.settings import Settings


@dataclass
class ServerState:
    settings: Settings
    backbone: Backbone
    forward: Forward
    library: Library
    metrics: Metrics
    admin: AdminWork = field(default_factory=AdminWork)
    started: float = field(default_factory=time.time)
    draining: bool = False  # a stop was asked for: no upload is begun any more
    engine_lost: Callable[[], None] = lambda: None  # set by who runs the process
    at_end: Callable[[], None] = lambda: None  # when the last request is answered
    engine: Engine = field(init=False)  # from the lifespan on: it needs the event loop

    @property
    def operators(self) -> str:
        """`compiled` or `torch`: what runs between the matrix products."""
        return self.forward.encoder.operators.name

    @property
    def dtype(self) -> str:
        encoder = self.forward.encoder
        return "int8" if encoder.int8 else str(encoder.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.forward.encoder.device)


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
