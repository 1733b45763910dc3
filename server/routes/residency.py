"""/adapters/{name}/load and its kind: bring a version into the slots, keep it, take it out."""

import asyncio

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from adapters.names import check_name
from server.adapter_answers import residency
from server.answer_shapes.adapters import Residency, Verified
from server.answers import JSONAnswer
from server.routes import adapter_documents as says
from server.routes.adapters import NAMED, may_use_adapter, who
from server.routes.documented import READ, errors, ok
from server.state import state_of

LOAD_TIMEOUT_S = 30.0
RESIDENT = ok(Residency, says.RESIDENCY_EXAMPLE, says="Where it is now.")
DRAINING = ok(Residency, says.RESIDENCY_EXAMPLE, status=202, says="Requests use it yet.")

router = APIRouter(prefix="/adapters", tags=["adapters"], dependencies=[Depends(may_use_adapter)])


@router.post(
    "/{name:adapter}/load",
    responses=errors(*READ, *NAMED, "overloaded")
    | RESIDENT
    | ok(Residency, says.RESIDENCY_EXAMPLE, status=202, says="It still loads."),
)
async def load(request: Request, name: str) -> Response:
    """Bring it into the slots; 200 when it is there, 202 while that still goes on."""
    library = state_of(request).library
    version, done = await asyncio.to_thread(library.load, name, LOAD_TIMEOUT_S)
    return JSONAnswer(residency(version, library), 200 if done else 202)


@router.post(
    "/{name:adapter}/unload",
    responses=errors(*READ, *NAMED, "read_only", "storage_full") | RESIDENT | DRAINING,
)
async def unload(request: Request, name: str) -> Response:
    """Take it out of the slots: 202 with in_flight while requests use it, 200 when it is gone."""
    library = state_of(request).library
    version, in_flight = await asyncio.to_thread(library.unload, name, who(request))
    answer = residency(version, library) | {"in_flight": in_flight}
    return JSONAnswer(answer, 202 if in_flight else 200)


@router.post(
    "/{name:adapter}/pin",
    responses=errors(*READ, *NAMED, "overloaded", "read_only", "storage_full") | RESIDENT,
)
async def pin(request: Request, name: str) -> Response:
    """Load it and exempt it from eviction."""
    library = state_of(request).library
    version = await asyncio.to_thread(library.pin, name, who(request))
    return JSONAnswer(residency(version, library))


@router.post(
    "/{name:adapter}/unpin",
    responses=errors(*READ, *NAMED, "read_only", "storage_full") | RESIDENT,
)
async def unpin(request: Request, name: str) -> Response:
    """Let it be evicted again."""
    library = state_of(request).library
    version = await asyncio.to_thread(library.unpin, name, who(request))
    return JSONAnswer(residency(version, library))


@router.post(
    "/{name:adapter}/verify",
    responses=errors(*READ, "adapter_not_found", "validation_error")
    | ok(Verified, says.VERIFIED_EXAMPLE, says="Every file was hashed."),
)
async def verify(request: Request, name: str) -> Response:
    """Hash the stored files of all versions again; one that is sound again is served again."""
    library = state_of(request).library
    check_name(name)
    named = await asyncio.to_thread(library.registry.named, name)
    faults = {
        str(version.number): await asyncio.to_thread(library.verify, version.digest)
        for version in named.versions
    }
    return JSONAnswer({"name": name, "sound": not any(faults.values()), "versions": faults})
