"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: vLLM's shapes, from one folder only."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from adapters.conditions import MUST_BE_NEW, UNCONDITIONAL
from adapters.errors import Conflict
from adapters.library import Library, Upload
from adapters.peft import PeftFolder
from adapters.peft_config import MAX_CONFIG_BYTES
from server.answer_shapes.adapters import LoadedLora, UnloadedLora
from server.answers import JSONAnswer, adapter_entry
from server.arrivals import Published, publish_folder
from server.bodies import read_json
from server.engine.errors import BadInput, Draining
from server.guard import check_adapter, confined_caller, key_of, patterns_of
from server.import_root import ImportRoot
from server.routes import adapter_documents as says
from server.routes.adapters import who
from server.routes.documented import BODY, UPLOAD, json_body, ok, openai_errors
from server.schemas import LoadLoraRequest, UnloadLoraRequest
from server.state import state_of
from server.uploads import WRITE_BYTES, too_large

router = APIRouter(prefix="/v1", tags=["adapters"])


@router.post(
    "/load_lora_adapter",
    responses=openai_errors(*BODY, *UPLOAD)
    | ok(LoadedLora, says.LOADED_EXAMPLE, says="It is served."),
    openapi_extra=json_body(
        LoadLoraRequest, file={"lora_name": "my-adapter", "lora_path": "verses.safetensors"}
    ),
)
async def load_lora_adapter(request: Request) -> Response:
    """Publish an adapter file or a PEFT folder below the import root under a name.

    A name that exists is refused with 400, as vLLM does, unless `load_inplace` is true. A key that
    is limited to some adapters reads only paths that its patterns match, without their suffix.
    """
    state = state_of(request)
    body = await read_json(request, LoadLoraRequest, state.settings.max_body_bytes)
    if state.draining:
        raise Draining("the server is stopping", retry_after_s=5)
    check_adapter(request, body.lora_name)
    confined = confined_caller(request)
    root = ImportRoot(state.settings.import_root, confined.key.may_use if confined else None)
    found = await state.admin.call(request, root.find, body.lora_path)
    condition = UNCONDITIONAL if body.load_inplace else MUST_BE_NEW
    patterns = patterns_of(request)
    wanted = Upload(body.lora_name, who(request), condition=condition, patterns=patterns)
    max_bytes = state.settings.max_adapter_bytes
    published = await _publish(request, state.library, wanted, found, max_bytes)
    answer = {"status": "success"} | (adapter_entry(published.version) or {})
    answer |= {} if published.converted is None else {"converted": published.converted}
    return JSONAnswer(answer)


@router.post(
    "/unload_lora_adapter",
    responses=openai_errors(*BODY, "adapter_not_found", "read_only", "storage_full")
    | ok(UnloadedLora, says.UNLOADED_EXAMPLE, says="It is gone.")
    | ok(UnloadedLora, {"status": "success", "in_flight": 2}, status=202, says="In use yet."),
    openapi_extra=json_body(UnloadLoraRequest, name={"lora_name": "my-adapter"}),
)
async def unload_lora_adapter(request: Request) -> Response:
    """Unpublish a name: 202 while requests use it, else 200."""
    state = state_of(request)
    body = await read_json(request, UnloadLoraRequest, state.settings.max_body_bytes)
    check_adapter(request, body.lora_name)
    remove, name = state.library.remove, body.lora_name
    in_flight = await state.admin.call(request, remove, name, None, who(request))
    return JSONAnswer({"status": "success", "in_flight": in_flight}, 202 if in_flight else 200)


async def _publish(
    request: Request,
    library: Library,
    wanted: Upload,
    found: Path | tuple[Path, Path],
    max_bytes: int,
) -> Published:
    admin = state_of(request).admin
    try:
        await admin.call(request, library.check_upload, wanted)
        if isinstance(found, Path):
            work = partial(_publish_file, library, wanted, found, max_bytes)
            return await admin.publish.run(key_of(request), work)
        read = partial(_read_folder, *found, max_bytes)
        return await publish_folder(request, library, wanted, read, max_bytes)
    except Conflict as error:  # no client sent a condition: load_inplace is what makes it one
        raise BadInput(
            f"the adapter {wanted.name} has already been loaded; set load_inplace to true to "
            "load a new version of it"
        ) from error


def _read_folder(config: Path, tensors: Path, max_bytes: int) -> PeftFolder:
    return PeftFolder(_read(config, MAX_CONFIG_BYTES), _read(tensors, max_bytes))


def _publish_file(library: Library, wanted: Upload, path: Path, max_bytes: int) -> Published:
    incoming = library.store.incoming()
    try:
        for part in _parts(path, max_bytes):
            incoming.write(part)
        return Published(*library.publish(wanted, incoming))
    finally:
        incoming.discard()


def _read(path: Path, max_bytes: int) -> bytearray:
    content = bytearray()
    for part in _parts(path, max_bytes):
        content += part
    return content


def _parts(path: Path, max_bytes: int) -> Iterator[bytes]:
    """Raises RequestError beyond so many bytes, BadInput where the file can't be read."""
    left = max_bytes
    try:
        with path.open("rb") as file:
            while part := file.read(WRITE_BYTES):
                left -= len(part)
                if left < 0:
                    raise too_large(max_bytes)
                yield part
    except OSError as error:
        raise BadInput(f"lora_path can't be read: {error.strerror}") from error
