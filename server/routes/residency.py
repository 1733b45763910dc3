"""/adapters/{name}/load and its kind: bring a version into the slots, keep it, take it out."""

import asyncio
import time

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from adapters.names import check_name
from adapters.versions import Version
from server.adapter_answers import residency
from server.admin_work import Stop, in_turn
from server.answer_shapes.adapters import Residency, Verified
from server.answers import JSONAnswer
from server.guard import key_of
from server.leaving import unless_client_leaves
from server.routes import adapter_documents as says
from server.routes.adapters import NAMED, may_use_adapter, who
from server.routes.documented import READ, errors, ok
from server.state import state_of

LOAD_TIMEOUT_S = 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.1  # between two looks at a load
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
    state = state_of(request)
    with state.admin.loads.take(key_of(request)):
        version, done = await unless_client_leaves(request, _load(request, name))
    return JSONAnswer(residency(version, state.library), 200 if done else 202)


async def _load(request: Request, name: str) -> tuple[Version, bool]:
    """Asks again and again: a request that waits for a load keeps no thread from others."""
    state, key = state_of(request), key_of(request)
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    pause_s = FIRST_PAUSE_S
    while True:
        version, done = await state.admin.call(request, state.library.load, name, 0.0, key)
        if done or time.monotonic() > deadline:
            return version, done
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        name = f"{version.name}@{version.number}"  # what it meant when it was asked for


@router.post(
    "/{name:adapter}/unload",
    responses=errors(*READ, *NAMED, "read_only", "storage_full") | RESIDENT | DRAINING,
)
async def unload(request: Request, name: str) -> Response:
    """Take it out of the slots: 202 with in_flight while requests use it, 200 when it is gone."""
    library = state_of(request).library
    admin = state_of(request).admin
    version, in_flight = await admin.call(request, library.unload, name, who(request))
    answer = residency(version, library) | {"in_flight": in_flight}
    return JSONAnswer(answer, 202 if in_flight else 200)


@router.post(
    "/{name:adapter}/pin",
    responses=errors(*READ, *NAMED, "overloaded", "read_only", "storage_full") | RESIDENT,
)
async def pin(request: Request, name: str) -> Response:
    """Load it and exempt it from eviction."""
    library = state_of(request).library
    admin, key = state_of(request).admin, key_of(request)
    version = await admin.call(request, library.pin, name, who(request), key)
    return JSONAnswer(residency(version, library))


@router.post(
    "/{name:adapter}/unpin",
    responses=errors(*READ, *NAMED, "read_only", "storage_full") | RESIDENT,
)
async def unpin(request: Request, name: str) -> Response:
    """Let it be evicted again."""
    library = state_of(request).library
    version = await state_of(request).admin.call(request, library.unpin, name, who(request))
    return JSONAnswer(residency(version, library))


@router.post(
    "/{name:adapter}/verify",
    responses=errors(*READ, "adapter_not_found", "validation_error")
    | ok(Verified, says.VERIFIED_EXAMPLE, says="Every file was hashed."),
)
async def verify(request: Request, name: str) -> Response:
    """Hash the stored files of all versions again; one that is sound again is served again."""
    state = state_of(request)
    check_name(name)
    named = await state.admin.call(request, state.library.registry.named, name)
    with state.admin.verifications.take(key_of(request)):
        faults = {str(version.number): await _fault(request, version) for version in named.versions}
    return JSONAnswer({"name": name, "sound": not any(faults.values()), "versions": faults})


async def _fault(request: Request, version: Version) -> str | None:
    """What is wrong with a version's file. Other keys have their turns between two files."""
    state = state_of(request)

    def work(_: Stop) -> str | None:
        return state.library.verify(version.digest)

    return await in_turn(request, state.admin.verify, work)
