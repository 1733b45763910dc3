"""The fields of text-embeddings-inference's GET /info, which its clients read before anything."""

from typing import Any

from starlette.requests import Request

from adapters.names import BASE
from server.guard import check_adapter
from server.named_path import reference_of
from server.state import ServerState, state_of

_POOLING = {"last": "last_token"}  # the others have the same name there


def tei_info(request: Request) -> dict[str, Any]:
    """What is served, in their names; below /as/ the adapter that the path names.

    Raises RequestError or TrunklineError for an adapter that is not there, or not for this key.
    """
    state, reference = state_of(request), reference_of(request.scope)
    backbone, settings = state.backbone, state.settings
    digest, labels = backbone.digest, None
    if reference not in (None, BASE):
        check_adapter(request, reference)
        version = state.library.version(reference)
        digest, labels = version.digest, version.manifest.labels
    return {
        "model_id": reference or backbone.id,
        "model_sha": digest,
        "model_dtype": state.dtype,
        "model_type": _model_type(state, labels),
        "max_concurrent_requests": None,
        "max_input_length": backbone.config.block_size,
        "max_batch_tokens": settings.max_batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_inputs,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "docker_label": None,
        "sha": None,
    }


def _model_type(state: ServerState, labels: tuple[str, ...] | None) -> dict[str, Any]:
    """Only an adapter that the path names can make it a classifier."""
    if not labels:
        pooling = state.backbone.config.pooling
        return {"embedding": {"pooling": _POOLING.get(pooling, pooling)}}
    by_place = {str(place): label for place, label in enumerate(labels)}
    by_label = {label: place for place, label in enumerate(labels)}
    return {"classifier": {"id2label": by_place, "label2id": by_label}}
