"""GET /diff: how far apart two adapters are, in numbers."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from adapters.difference import Distance, distances
from adapters.errors import Damaged
from adapters.format import AdapterSet
from adapters.library import Library
from adapters.versions import Version
from model.checkpoint import Backbone
from server.admin_work import Stop, in_turn
from server.answer_shapes.differences import DiffAnswer
from server.answers import JSONAnswer, adapter_entry
from server.engine.errors import BadInput
from server.guard import check_adapter, key_of
from server.routes.adapters import NAMED
from server.routes.documented import READ, errors, ok, references
from server.state import state_of

router = APIRouter(tags=["adapters"])


@router.get(
    "/diff",
    responses=errors(*READ, *NAMED) | ok(DiffAnswer),
    openapi_extra=references(a=("An adapter reference.", "verses"), b=("Another one.", "era")),
)
async def diff(request: Request) -> Response:
    """Where two adapters' weights differ, and how much: Frobenius norms at every place of the model
    that one of them changes, of what `a` changes, of what `b` changes, and of the `difference`.
    """
    a, b = _reference(request, "a"), _reference(request, "b")
    state = state_of(request)

    def work(stop: Stop) -> dict[str, Any]:
        return _diff(state.library, state.backbone, a, b, stop)

    with state.admin.diffs.take(key_of(request)):
        return JSONAnswer(await in_turn(request, state.admin.diff, work))


def _reference(request: Request, name: str) -> str:
    reference = request.query_params.get(name)
    if reference is None:
        raise BadInput(f"{name} must be an adapter reference")
    check_adapter(request, reference)
    return reference


def _diff(library: Library, backbone: Backbone, a: str, b: str, stop: Stop) -> dict[str, Any]:
    stop.check()
    first, set_a = _read(library, a)
    stop.check()
    second, set_b = _read(library, b)
    stop.check()
    weights = [_entry(found) for found in distances(set_a, set_b, _own(backbone))]
    return {"a": adapter_entry(first), "b": adapter_entry(second), "weights": weights}


def _read(library: Library, reference: str) -> tuple[Version, AdapterSet]:
    version = library.registry.resolve(reference)
    try:
        return version, library.store.read(version.digest)
    except Damaged:
        library.registry.resolve(reference)  # says so where it was deleted meanwhile
        raise


def _own(backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's own tensors, by the names of what an adapter puts in their place."""
    table = backbone.calibration
    return {**backbone.tensors} | ({} if table is None else {"calibration": table})


def _entry(found: Distance) -> dict[str, Any]:
    """`relative` is to the larger one of both: 1 where only one changes the place."""
    larger = max(found.a, found.b)
    relative = None if found.between is None or larger == 0 else found.between / larger
    return {
        "key": found.key,
        "a": found.a,
        "b": found.b,
        "difference": found.between,
        "relative": relative,
    }
