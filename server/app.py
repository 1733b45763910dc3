"""create_app: the lifespan and the wiring."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path

import torch
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

import model
from adapters.errors import TrunklineError
from adapters.registry import FolderRegistry
from model.checkpoint import Backbone, read_backbone
from server import __version__
from server.answers import JSONAnswer
from server.engine.engine import Engine, choose_device, choose_dtype
from server.engine.forward import Forward
from server.errors import STATUS, RequestError, error_body, openai_error_body
from server.metrics import Metrics
from server.middleware import RequestContext
from server.routes import adapters, critic, encode, openai, ops, tokens
from server.settings import Settings
from server.state import ServerState

DEMO_BACKBONE = Path(model.__file__).parent / "demo"
CLIENT_LEFT = 499  # nobody reads it; the log and the metrics show it


def create_app(settings: Settings) -> FastAPI:
    """The application. Reading the backbone and its adapters fails here, before anything listens.

    Raises BackboneError or TrunklineError with a sentence for a folder that can't be served.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    backbone = read_backbone(settings.backbone or DEMO_BACKBONE)
    registry = FolderRegistry(_adapter_folder(settings), backbone, dtype, device)
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = _engine(settings, backbone, registry, dtype, device, metrics)
        app.state.server = ServerState(
            settings, backbone, registry, engine, metrics, _name(dtype), str(device)
        )
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(title="trunkline", version=__version__, lifespan=lifespan)
    app.state.settings = settings
    app.state.registry, app.state.backbone = registry, backbone
    app.state.placed = f"{_name(dtype)} on {device}"
    app.add_middleware(RequestContext, metrics=metrics)
    for routes in (encode, critic, openai, tokens, adapters, ops):
        app.include_router(routes.router)
    app.add_exception_handler(TrunklineError, _refused)
    app.add_exception_handler(HTTPException, _refused_by_router)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _broken)
    return app


def _engine(
    settings: Settings,
    backbone: Backbone,
    registry: FolderRegistry,
    dtype: torch.dtype,
    device: torch.device,
    metrics: Metrics,
) -> Engine:
    return Engine(
        backbone,
        registry,
        Forward(backbone, dtype, device),
        metrics,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_tokens=settings.max_queue_tokens,
        max_request_tokens=settings.max_request_tokens,
    )


def _adapter_folder(settings: Settings) -> Path | None:
    """--adapters, or the backbone's own `adapters` folder; the demo's stand under adapters/demo."""
    if settings.adapters is not None:
        return settings.adapters
    if settings.backbone is None:
        return DEMO_BACKBONE.parent.parent / "adapters" / "demo"
    beside = settings.backbone / "adapters"
    return beside if beside.is_dir() else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _answer(request: Request, error: TrunklineError) -> Response:
    if request.url.path.startswith("/v1/"):
        body = openai_error_body(error)
    else:
        body = error_body(error, getattr(request.state, "request_id", None))
    headers = {}
    if "retry_after_s" in error.details:
        headers["retry-after"] = str(error.details["retry_after_s"])
    return JSONAnswer(body, STATUS[error.code], headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, TrunklineError)
    return _answer(request, error)


async def _refused_by_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = (
        "method_not_allowed" if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else "not_found"
    )
    response = _answer(request, RequestError(code, HTTPStatus(error.status_code).phrase))
    response.headers.update(error.headers or {})
    return response


async def _client_left(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _broken(request: Request, _: Exception) -> Response:
    return _answer(request, RequestError("internal_error", "a fault of the server; its log has it"))
