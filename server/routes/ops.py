"""Health, readiness, metrics, and what is served."""

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from server import __version__
from server.answer_shapes.operations import EngineState, Health, Info, Readiness
from server.answers import JSONAnswer
from server.engine.errors import Draining, NotReady
from server.guard import check_unconfined, confined_caller
from server.routes.documented import READ, errors, ok, public_errors
from server.state import state_of
from server.tei_info import tei_info

MAX_LISTED = 100  # unusable adapter files in /ready's details
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter(tags=["operations"])


@router.get("/health", responses=public_errors() | ok(Health))
async def health() -> Response:
    """The process is alive. Answered by the event loop alone; never waits for a forward."""
    return JSONAnswer({"status": "ok"})


@router.get("/ready", responses=public_errors("not_ready", "draining") | ok(Readiness))
async def ready(request: Request) -> Response:
    """Whether to send traffic here: the device thread lives and is not stuck."""
    if state_of(request).draining:
        raise Draining("the server is stopping")
    if not state_of(request).engine.ready:
        raise NotReady("the engine is not running, or stuck")
    details = _unusable(request) | _storage_fault(request)
    return JSONAnswer({"status": "ready"} | ({"details": details} if details else {}))


def _storage(request: Request) -> dict[str, Any]:
    library = state_of(request).library
    fault = library.disk.fault
    return {
        "uploads": fault is None,
        "fault": None if fault is None else asdict(fault),
        "reserve_bytes": library.reserve.size if library.reserve.whole else 0,
    }


def _storage_fault(request: Request) -> dict[str, Any]:
    """What keeps the data folder from being written; reads are served meanwhile."""
    fault = state_of(request).library.disk.fault
    return {} if fault is None else {"storage": asdict(fault)}


def _unusable(request: Request) -> dict[str, Any]:
    """The adapter files that are not served; only how many where keys are configured, since names
    are tenants' own."""
    unusable = state_of(request).library.unusable
    if not unusable:
        return {}
    details: dict[str, Any] = {"unusable_files": len(unusable)}
    if not request.app.state.keys.configured:
        listed = unusable[:MAX_LISTED]
        details["unusable"] = [{"file": each.file, "reason": each.reason} for each in listed]
    return details


@router.get(
    "/metrics",
    response_class=Response,
    responses=errors()
    | {200: {"description": "Done.", "content": {EXPOSITION: {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus' text format. A key that is limited to some adapters gets what these adapters ran
    and what the key itself used, and no totals of the server.
    """
    metrics, confined = state_of(request).metrics, confined_caller(request)
    if confined is None:
        exposition = metrics.exposition()
    else:
        key = confined.key
        exposition = metrics.own_exposition(key.id, key.adapters, key.may_use)
    return Response(exposition, media_type=EXPOSITION)


@router.get("/info", responses=errors(*READ) | ok(Info))
async def info(request: Request) -> Response:
    """The backbone, its config, where and in which dtype it runs, and the limits. For a key that is
    limited to some adapters `adapters` and `leases` count these alone, and `slots` is left out.
    """
    state = state_of(request)
    backbone, settings = state.backbone, state.settings
    limits = settings.model_dump(
        include={
            "max_batch_tokens",
            "max_queue_tokens",
            "max_inputs",
            "max_request_tokens",
            "max_answer_values",
            "max_answer_bytes",
            "max_body_bytes",
            "default_timeout_ms",
        }
    )
    heads = {
        "critic": state.engine.admission.has_critic,
        "sequence": "sequence_head.A" in backbone.tensors,
        "calibration": backbone.calibration is not None,
    }
    return JSONAnswer(
        {
            "version": __version__,
            "backbone": {"id": backbone.id, "digest": backbone.digest, "heads": heads},
            "config": backbone.config.to_dict(),
            "dtype": state.dtype,
            "device": state.device,
            "operators": state.operators,
            "storage": _storage(request),
            "limits": limits | {"block_size": backbone.config.block_size},
        }
        | await _adapter_counts(request)
        | tei_info(request)
    )


async def _adapter_counts(request: Request) -> dict[str, Any]:
    """How many adapters there are, and where: of all, or of those that the key may see."""
    library, confined = state_of(request).library, confined_caller(request)
    if confined is None:
        slots, leases = asdict(library.slots.stats()), library.leases.total
        return {"adapters": library.registry.count(), "slots": slots, "leases": leases}
    patterns = confined.key.adapters
    own = await state_of(request).admin.call(request, library.registry.creation_times, patterns)
    return {"adapters": len(own), "leases": sum(map(library.leases.of_name, own))}


@router.get("/debug/engine", responses=errors(*READ) | ok(EngineState))
async def debug_engine(request: Request) -> Response:
    """Queue, slots and leases right now, for an admin's key that is not limited to adapters."""
    check_unconfined(request)
    state = state_of(request)
    engine = state.engine
    since = engine.loop.busy_since
    return JSONAnswer(
        {
            "ready": engine.ready,
            "batch_s": None if since is None else time.monotonic() - since,
            "waiting_rows": len(engine.queue),
            "tokens_admitted": engine.admission.permits.held,
            "slots": asdict(state.library.slots.stats()),
            "leases": state.library.leases.total,
        }
    )


@router.get("/", include_in_schema=False)
async def root() -> Response:
    return RedirectResponse("/docs")
