"""GET /adapters: what can be named in a request."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from adapters.registry import Version
from server.answers import JSONAnswer
from server.routes.documented import READ, errors
from server.state import state_of

router = APIRouter(prefix="/adapters", tags=["adapters"])


@router.get("", responses=errors(*READ))
async def adapters(request: Request) -> Response:
    """Every adapter with its version, digest, rank and bytes."""
    data = [_entry(version) for version in state_of(request).registry]
    return JSONAnswer({"object": "list", "data": data})


def _entry(version: Version) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.number,
        "digest": version.digest,
        "rank": version.manifest.rank,
        "bytes": version.bytes,
        "created_at": version.created_at,
    }
