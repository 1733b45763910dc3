"""What the metrics read of the rest of the server, and what the log says of it at the start."""

import logging

import torch

from adapters.errors import ReadOnly, StorageFull
from adapters.library import Library
from server import __version__
from server.keys import KeyRing
from server.state import ServerState

REFUSED_WRITES = (ReadOnly.code, StorageFull.code)

log = logging.getLogger("trunkline")


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
    fault = library.disk.fault
    counts: dict[str, float] = {
        "damaged": library.registry.damaged_count(),
        "unusable": len(library.unusable),  # files of the adapter folder
        "quarantined": library.disk.quarantined,
    }
    return counts | {
        kind: float(fault is not None and fault.code == kind) for kind in REFUSED_WRITES
    }
