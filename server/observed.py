"""What the metrics read of the rest of the server, and what the log says of it at the start."""

import logging

import torch

from adapters.errors import ReadOnly, StorageFull
from adapters.library import Library
from server import __version__
from server.keys import KeyRing
from server.state import ServerState

log = logging.getLogger("trunkline")

WRITES_OFF = (StorageFull.code, ReadOnly.code)


def observe(state: ServerState, keys: KeyRing) -> None:
    """Let the metrics read the faults of the data folder, the keys' names, and what runs."""
    metrics, library, backbone = state.metrics, state.library, state.backbone
    metrics.watch_storage(lambda: storage_faults(library))
    metrics.keys.names = keys.names
    metrics.set_build(
        version=__version__,
        torch=torch.__version__,
        dtype=state.dtype,
        device=state.device,
        backbone=backbone.id,
        digest=backbone.digest,
    )
    if library.registry.exists(backbone.id):
        log.warning(
            "an adapter has the backbone's own id as its name, %s: where a request says model, "
            "this id means the backbone; `adapter` and /adapters still mean the adapter",
            backbone.id,
        )


def storage_faults(library: Library) -> dict[str, float]:
    """How many faults the data folder has, by kind.

    A kind is there when its count is 0 too, so that an alert on it has a series to look at.
    """
    return {
        "damaged": library.registry.damaged_count(),
        "unusable": len(library.unusable),  # files of the adapter folder
        **{code: float(_refused_with(library) == code) for code in WRITES_OFF},
    }


def _refused_with(library: Library) -> str | None:
    """The code that uploads get now because of the disk, None where it takes them."""
    fault = library.disk.fault
    return None if fault is None else fault.code
