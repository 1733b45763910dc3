"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: vLLM's shapes, from one folder only."""

import asyncio
import os
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from adapters.conditions import MUST_BE_NEW, UNCONDITIONAL
from adapters.library import Library, Upload
from adapters.store import Incoming
from adapters.versions import Version
from server.answers import JSONAnswer, adapter_entry
from server.bodies import read_json
from server.engine.errors import BadInput, Draining
from server.errors import RequestError
from server.guard import check_adapter
from server.routes.documented import BODY, IN_USE, UPLOAD, json_body, openai_errors
from server.schemas import LoadLoraRequest, UnloadLoraRequest
from server.state import state_of
from server.uploads import WRITE_BYTES, too_large

router = APIRouter(prefix="/v1", tags=["adapters"])


@router.post(
    "/load_lora_adapter",
    responses=openai_errors(*BODY, *UPLOAD),
    openapi_extra=json_body(LoadLoraRequest),
)
async def load_lora_adapter(request: Request) -> Response:
    """Publish a file below the import root under a name; load_inplace takes a name that exists."""
    state = state_of(request)
    body = await read_json(request, LoadLoraRequest, state.settings.max_body_bytes)
    if state.draining:
        raise Draining("the server is stopping", retry_after_s=5)
    check_adapter(request, body.lora_name)
    path = await asyncio.to_thread(_confined, body.lora_path, state.settings.import_root)
    condition = UNCONDITIONAL if body.load_inplace else MUST_BE_NEW
    wanted = Upload(body.lora_name, "load_lora_adapter", condition=condition)
    version = await asyncio.to_thread(
        _publish, state.library, wanted, path, state.settings.max_adapter_bytes
    )
    return JSONAnswer({"status": "success"} | (adapter_entry(version) or {}))


@router.post(
    "/unload_lora_adapter",
    responses=openai_errors(*BODY, "adapter_not_found", "read_only", "storage_full") | IN_USE,
    openapi_extra=json_body(UnloadLoraRequest),
)
async def unload_lora_adapter(request: Request) -> Response:
    """Unpublish a name: 202 while requests use it, else 200."""
    state = state_of(request)
    body = await read_json(request, UnloadLoraRequest, state.settings.max_body_bytes)
    check_adapter(request, body.lora_name)
    in_flight = await asyncio.to_thread(
        state.library.remove, body.lora_name, None, "unload_lora_adapter"
    )
    return JSONAnswer({"status": "success", "in_flight": in_flight}, 202 if in_flight else 200)


def _confined(lora_path: str, root: Path | None) -> Path:
    """The file that lora_path means below the root, links followed; a folder's one file in it.

    Raises RequestError; what is outside is told from what is missing by no answer.
    """
    if root is None:
        raise RequestError("forbidden", "no import root is configured: set --import-root")
    if "\0" in lora_path:
        raise BadInput("lora_path has a NUL")
    path = _below(root, root / lora_path)
    if os.path.isdir(path):
        files = list(path.glob("*.safetensors"))
        if len(files) != 1:
            raise BadInput("a folder must have one safetensors file to be loaded")
        path = _below(root, files[0])
    if not os.path.isfile(path):
        raise BadInput("lora_path is not a file below the import root")
    return path


def _below(root: Path, path: Path) -> Path:
    try:
        resolved = path.resolve()
    except RuntimeError:  # a loop of links
        resolved = Path()
    if not resolved.is_relative_to(root.resolve()):
        raise RequestError("forbidden", "lora_path leads out of the import root")
    return resolved


def _publish(library: Library, wanted: Upload, path: Path, max_bytes: int) -> Version:
    library.check_upload(wanted)
    incoming = library.store.incoming()
    try:
        _copy(path, incoming, max_bytes)
        version, _ = library.publish(wanted, incoming)
        return version
    finally:
        incoming.discard()


def _copy(path: Path, incoming: Incoming, max_bytes: int) -> None:
    try:
        with path.open("rb") as file:
            while part := file.read(WRITE_BYTES):
                if incoming.bytes + len(part) > max_bytes:
                    raise too_large(max_bytes)
                incoming.write(part)
    except OSError as error:
        raise BadInput(f"lora_path can't be read: {error.strerror}") from error
