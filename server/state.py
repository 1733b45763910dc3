"""What a running server has: made once by the app, read by the routes."""

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from adapters.registry import FolderRegistry
from model.checkpoint import Backbone
from server.engine.engine import Engine
from server.metrics import Metrics
from server.settings import Settings


@dataclass
class ServerState:
    settings: Settings
    backbone: Backbone
    registry: FolderRegistry
    engine: Engine
    metrics: Metrics
    dtype: str
    device: str
    started: float = field(default_factory=time.time)


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
