"""create_app: the lifespan and the wiring."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters.errors import TrunklineError
from adapters.host_tier import HostTier
from adapters.library import Library
from adapters.reserve import RESERVE_BYTES
from adapters.restore import cut_off
from adapters.slots import SlotPool
from model.checkpoint import Backbone, read_backbone
from model.demo import FOLDER as DEMO_BACKBONE
from model.precision import choose_device, choose_dtype
from server import __version__
from server.answer_memory import AnswerMemoryEnds
from server.answers import JSONAnswer
from server.building import Builders
from server.cors import Cors, CorsHeaders
from server.engine.engine import Engine
from server.engine.forward import Forward
from server.errors import CODE, RequestError, error_answer, no_route, wrong_method
from server.guard import Guard
from server.heads import Heads
from server.hot import HotRoutes
from server.inputs import TokenizerThreads
from server.keys import KeyRing
from server.keys_mark import lost_keys, note_keys
from server.metrics import Metrics
from server.middleware import RequestContext
from server.named_path import PREFIX, NamedPaths
from server.observed import observe
from server.paths import Paths
from server.proxies import Proxies
from server.routes import (
    adapters,
    critic,
    diff,
    encode,
    openai,
    ops,
    rerank,
    residency,
    tei,
    tokens,
    vllm,
)
from server.routes.document import completed
from server.settings import BadSettings, Settings, default_data_dir
from server.shed import Shed
from server.state import ServerState
from server.turns import Turns

DEMO_ADAPTERS = DEMO_BACKBONE.parent.parent / "adapters" / "demo"
HOT = {
    "/encode": encode.encode,
    "/critic": critic.critic,
    "/classify": critic.classify,
    "/v1/embeddings": openai.embeddings,
    "/v1/rerank": rerank.rerank,
    "/v2/rerank": rerank.rerank,
    "/rerank": rerank.rerank,
    "/embed": tei.embed,
    "/embed_all": tei.embed_all,
    "/similarity": tei.similarity,
    "/predict": tei.predict,
    "/": tei.root,
}
TOKENIZER = ("/tokenize", "/detokenize")
ROUTES = (encode, critic, openai, rerank, tei, vllm, tokens, residency, adapters, diff, ops)
CLIENT_LEFT = 499  # nobody reads it; the log and the metrics show it


def create_app(settings: Settings) -> FastAPI:
    """The application. What can't be served fails here, before anything listens.

    Raises BackboneError, BadKeys or TrunklineError, with a sentence, for a backbone folder, a
    keys file or a data folder that can't be used, Int8Unavailable for int8 where it can't be,
    BadSettings for an adapter folder, a GPU or the traces' extra that is not there.
    """
    app = FastAPIOffline(  # /docs with scripts of its own: no other host is asked for them
        redoc_url=None, title="trunkline", version=__version__, lifespan=_lifespan
    )
    _check_settings(settings, app)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = _device(settings)
    dtype = choose_dtype(settings.dtype, device)
    keys = settings.keys or (settings.data_dir or default_data_dir()) / "keys.json"
    app.state.keys = KeyRing(keys)
    _demand_whole_data(settings)
    _demand_known_keys(settings, app.state.keys)
    backbone = read_backbone(settings.backbone or DEMO_BACKBONE)
    forward = Forward(backbone, dtype, device, int8=settings.dtype == "int8")
    library = _library(settings, backbone, forward)
    app.state.settings = settings
    app.state.turns = Turns(settings.max_queue_s, settings.max_body_bytes)
    app.state.builders = Builders(settings.answer_memory)
    app.state.tokenizer_threads = TokenizerThreads()
    answers = app.state.builders.memory
    app.state.server = ServerState(settings, backbone, forward, library, Metrics())
    app.state.server.metrics.answer_bytes.set_function(lambda: answers.held)
    app.state.server.metrics.watch_residency(lambda: _residency(library))
    observe(app.state.server, app.state.keys)
    for routes in ROUTES:
        app.include_router(routes.router)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    app.add_exception_handler(TrunklineError, _refused)
    app.add_exception_handler(HTTPException, _refused_by_router)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _broken)
    app.router.redirect_slashes = False  # server/paths.py: both paths answer
    cors = Cors(settings.cors_origins)
    app.state.shed = Shed(app.state.server, app.state.keys, HOT, cors)
    hot = HotRoutes(app.build_middleware_stack(), HOT, app.exception_handlers)
    counted = AnswerMemoryEnds(hot)
    named = NamedPaths(Guard(counted, app.state.keys), (*HOT, *TOKENIZER))
    inner: ASGIApp = CorsHeaders(Heads(named), cors)
    if settings.otlp_endpoint:
        inner = _traced(inner, settings.otlp_endpoint, app.state.server)
    state: ServerState = app.state.server
    noted = RequestContext(inner, state.metrics, lambda: state.draining)
    app.middleware_stack = Paths(Proxies(noted, settings.trusted_proxies), settings.root_path)
    return app


def _demand_whole_data(settings: Settings) -> None:
    """Raises BadSettings for a data folder whose restore was cut off."""
    fault = cut_off(settings.data_dir or default_data_dir())
    if fault is not None:
        raise BadSettings(fault)


def _demand_known_keys(settings: Settings, keys: KeyRing) -> None:
    """Raises BadSettings where a keys file that there was is gone, unless told to serve openly."""
    if keys.configured:
        note_keys(keys.path)
    elif not settings.insecure and (fault := lost_keys(keys.path)):
        raise BadSettings(fault)


def _check_settings(settings: Settings, app: FastAPI) -> None:
    """Raises BadSettings for files that are not there, or a prefix of paths of the server's own."""
    if settings.import_root is not None and not settings.import_root.is_dir():
        raise BadSettings(f"setting import_root: {settings.import_root} is no folder")
    if settings.keys is not None and not settings.keys.exists():
        raise BadSettings(
            lost_keys(settings.keys)
            or f"setting keys: {settings.keys} is not there; make a key with "
            f"`trunkline keys --file {settings.keys} new`, or leave the setting out"
        )
    first = settings.root_path.split("/")[1] if settings.root_path else ""
    routes = itertools.chain(app.routes, *(module.router.routes for module in ROUTES))
    paths = [PREFIX, *(getattr(route, "path", "") for route in routes)]
    taken = {path.split("/")[1] for path in paths if "/" in path}
    if first and first in taken:
        raise BadSettings(f"setting root_path: the server has paths of its own below /{first}")


def _device(settings: Settings) -> torch.device:
    device = choose_device(settings.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadSettings(f"setting device: {device} is not there for torch {torch.__version__}")
    return device


def direct(app: FastAPI) -> ASGIApp:
    """Its requests straight to the middleware: FastAPI looks for telemetry before each of them."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or app.middleware_stack is None:
            await app(scope, receive, send)
            return
        scope["app"] = app
        await app.middleware_stack(scope, receive, send)

    return serve


def _traced(app: ASGIApp, endpoint: str, state: ServerState) -> ASGIApp:
    try:
        from server.traces import Traced  # noqa: PLC0415 -- an extra's
    except ImportError as error:
        raise BadSettings("setting otlp_endpoint: it needs trunkline[otel] installed") from error
    traced = Traced(app, endpoint, __version__)
    state.at_end = traced.provider.shutdown
    return traced


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = completed(FastAPI.openapi(app))
    return app.openapi_schema


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.server
    state.engine = Engine(
        state.backbone,
        state.library,
        state.forward,
        state.metrics,
        max_batch_tokens=state.settings.max_batch_tokens,
        max_queue_tokens=state.settings.max_queue_tokens,
        max_request_tokens=state.settings.max_request_tokens,
        max_queue_s=state.settings.max_queue_s,
        fair_shares=state.settings.fair_shares,
    )
    state.engine.lost = state.engine_lost
    state.engine.start()
    yield
    await state.engine.stop()
    await app.state.turns.close()
    await state.admin.close()
    await app.state.builders.threads.close()
    await app.state.tokenizer_threads.close()
    state.library.close()
    await asyncio.to_thread(state.at_end)


def _library(settings: Settings, backbone: Backbone, forward: Forward) -> Library:
    """The library of this backbone in the data folder, with the adapter folder's files in it."""
    folder = _adapter_folder(settings)
    encoder = forward.encoder
    tier = HostTier(encoder.config, encoder.dtype, settings.host_memory)
    library = Library(
        data_folder(settings, backbone),
        backbone,
        encoder,
        lambda read: SlotPool(
            encoder.config,
            encoder.dtype,
            encoder.device,
            capacity_bytes=settings.adapter_memory,
            max_slots=settings.slots,
            read=read,
            host_tier=tier if encoder.device.type == "cuda" else None,
            debug=settings.debug_slots,
        ),
        quota=settings.storage_quota,
        max_rank=settings.max_rank,
        reserve_bytes=RESERVE_BYTES,
    )
    if folder is not None:
        library.seed(folder)
    return library


def _residency(library: Library) -> dict[str, float]:
    """What the metrics tell of the adapters."""
    slots = library.slots.stats()
    return {
        "adapters_registered": library.registry.count(),
        "adapters_resident": slots.resident,
        "adapters_pinned": slots.pinned,
        "slot_bytes_used": slots.used_bytes,
        "slot_bytes_capacity": slots.capacity_bytes,
        "leases": library.leases.total,
        "adapter_loads": slots.loads,
        "adapter_evictions": slots.evictions,
    }


def data_folder(settings: Settings, backbone: Backbone) -> Path:
    """Where this backbone's registry is: adapters of one trunk mean nothing to another."""
    root = settings.data_dir or default_data_dir()
    return root / f"{backbone.id}-{backbone.digest.removeprefix('sha256:')[:16]}"


def _adapter_folder(settings: Settings) -> Path | None:
    """--adapters, or the backbone's own `adapters` folder; the demo's stand under adapters/demo."""
    if settings.adapters is not None:
        if not settings.adapters.is_dir():
            raise BadSettings(f"setting adapters: {settings.adapters} is not a folder")
        return settings.adapters
    backbone = settings.backbone or DEMO_BACKBONE
    if backbone.samefile(DEMO_BACKBONE):
        return DEMO_ADAPTERS
    beside = backbone / "adapters"
    return beside if beside.is_dir() else None


def _answer(request: Request, error: TrunklineError) -> Response:
    scope = request.scope
    answer = error_answer(error, scope["path"], scope["state"].get("request_id"))
    scope["state"][CODE] = error.code
    return JSONAnswer(answer.body, answer.status, answer.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, TrunklineError)
    return _answer(request, error)


async def _refused_by_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED:
        return _answer(request, no_route())
    methods = _methods(request)
    response = _answer(request, wrong_method(methods))
    response.headers["allow"] = ", ".join(methods)
    return response


def _methods(request: Request) -> list[str]:
    """Those of every route of the path that fits first; Starlette tells of one route alone."""
    own = itertools.chain.from_iterable(routes.router.routes for routes in ROUTES)
    # those that the app includes show no methods there
    fitting = [r for r in (*own, *request.app.routes) if r.matches(request.scope)[0] != Match.NONE]
    paths = [getattr(route, "path", None) for route in fitting]
    first = next((path for path in paths if path is not None), None)
    methods: set[str] = set()
    for route, path in zip(fitting, paths, strict=True):
        if path == first:
            methods |= getattr(route, "methods", None) or set()
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


async def _client_left(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _broken(request: Request, _: Exception) -> Response:
    return _answer(request, RequestError("internal_error", "a fault of the server; its log has it"))
