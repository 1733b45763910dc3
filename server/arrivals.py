"""Uploads that are published: an adapter file as it is, a PEFT folder converted on arrival."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from adapters.library import Library, Upload
from adapters.peft import PeftFolder, convert
from adapters.peft_archive import read_archive
from adapters.versions import Version
from server.uploads import Arrived, too_large

# One thread: a conversion holds a folder and what is made of it in memory, up to three times the
# largest adapter file. The event loop and the other uploads go on meanwhile.
_CONVERTER = ThreadPoolExecutor(1, "peft")


@dataclass(frozen=True)
class Published:
    version: Version
    is_new: bool
    converted: Mapping[str, Any] | None = None  # what was made of a PEFT folder


async def publish(library: Library, wanted: Upload, arrived: Arrived, max_bytes: int) -> Published:
    """Raises as Library.publish, and PeftRefused."""
    if arrived.form is None:
        return Published(*await asyncio.to_thread(library.publish, wanted, arrived.incoming))
    path, form, boundary = arrived.incoming.path, arrived.form, arrived.boundary
    read = partial(read_archive, path, form, max_bytes, boundary)
    return await publish_folder(library, wanted, read, max_bytes)


async def publish_folder(
    library: Library, wanted: Upload, read: Callable[[], PeftFolder], max_bytes: int
) -> Published:
    """The same for the PEFT folder that `read` returns."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_CONVERTER, _publish_folder, library, wanted, read, max_bytes)


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
