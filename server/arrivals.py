"""Uploads that are published: an adapter file as it is, a PEFT folder converted on arrival."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request

from adapters.library import Library, Upload
from adapters.peft import PeftFolder, convert
from adapters.peft_archive import read_archive
from adapters.versions import Version
from server.guard import key_of
from server.state import state_of
from server.uploads import Arrived, too_large


@dataclass(frozen=True)
class Published:
    version: Version
    is_new: bool
    converted: Mapping[str, Any] | None = None  # what was made of a PEFT folder


async def publish(
    request: Request, library: Library, wanted: Upload, arrived: Arrived, max_bytes: int
) -> Published:
    """Validated, probed and stored in turn with other keys' uploads, whether or not the client
    stays. Raises as Library.publish, PeftRefused, and Overloaded.
    """
    if arrived.form is None:
        publishing = state_of(request).admin.publish
        work = partial(library.publish, wanted, arrived.incoming)
        return Published(*await publishing.run(key_of(request), work))
    path, form, boundary = arrived.incoming.path, arrived.form, arrived.boundary
    read = partial(read_archive, path, form, max_bytes, boundary)
    return await publish_folder(request, library, wanted, read, max_bytes)


async def publish_folder(
    request: Request,
    library: Library,
    wanted: Upload,
    read: Callable[[], PeftFolder],
    max_bytes: int,
) -> Published:
    """The same for the PEFT folder that `read` returns."""
    work = partial(_publish_folder, library, wanted, read, max_bytes)
    return await state_of(request).admin.convert.run(key_of(request), work)


def _publish_folder(
    library: Library, wanted: Upload, read: Callable[[], PeftFolder], max_bytes: int
) -> Published:
    converted = convert(read(), library.backbone)
    if len(converted.file) > max_bytes:
        raise too_large(max_bytes)
    incoming = library.store.incoming()
    try:
        incoming.write(converted.file)
        return Published(*library.publish(wanted, incoming), converted.report)
    finally:
        incoming.discard()
