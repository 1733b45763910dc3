"""An uploaded file: streamed to the disk while it is hashed, never whole in memory."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from starlette.requests import ClientDisconnect, Request

from adapters.format import header_length
from adapters.peft_archive import Form
from adapters.store import BlobStore, Incoming
from server.bodies import declared_length
from server.digests import Verifier, declared_digests
from server.errors import RequestError
from server.guard import key_of
from server.state import state_of

WRITE_BYTES = 1 << 20  # written at once, in a worker thread
# An adapter file (None), or the form in which a PEFT folder comes
CONTENT_TYPES: dict[str, Form | None] = {
    "application/octet-stream": None,
    "application/vnd.safetensors": None,
    "application/zip": Form.ZIP,
    "application/x-zip-compressed": Form.ZIP,
    "application/x-tar": Form.TAR,
    "application/gzip": Form.TAR_GZ,
    "application/x-gzip": Form.TAR_GZ,
    "multipart/form-data": Form.MULTIPART,
}


@dataclass(frozen=True)
class Arrived:
    """An upload on the disk. `form` is None for an adapter file."""

    incoming: Incoming
    form: Form | None
    boundary: str = ""  # of multipart


@asynccontextmanager
async def upload(
    request: Request, store: BlobStore, max_bytes: int, timeout_s: float
) -> AsyncIterator[Arrived]:
    """The body as an Incoming, discarded at the end of the block unless it was stored.

    It has a place among its key's uploads, a file and a descriptor from its first bytes on: a head
    alone holds nothing.

    Raises RequestError; Invalid where the first bytes show that it is no adapter file, or where
    the bytes are not those that the headers declare; StorageFull or ReadOnly; Overloaded.
    """
    form, boundary = _check_headers(request, max_bytes)
    verifier = Verifier(declared_digests(request))
    admin, key = state_of(request).admin, key_of(request)
    parts, deadline = request.stream(), asyncio.get_running_loop().time() + timeout_s
    async with _in_time(deadline, timeout_s):
        first = await anext(parts, b"")
    with admin.incoming.take(key):
        incoming = await admin.uploads.run(key, store.incoming)
        try:
            arrived = Arrived(incoming, form, boundary)
            disk = partial(admin.uploads.run, key)
            async with _in_time(deadline, timeout_s):
                await _write_body(_after(first, parts), arrived, verifier, max_bytes, disk)
            verifier.check()
            yield arrived
        finally:
            await asyncio.to_thread(incoming.discard)


def _check_headers(request: Request, max_bytes: int) -> tuple[Form | None, str]:
    """The body's form and, of multipart, its boundary."""
    kind, _, options = request.headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    if kind not in CONTENT_TYPES:
        raise RequestError(
            "unsupported_media_type",
            "the body must be application/octet-stream (an adapter file), or a PEFT folder as "
            "application/zip, application/x-tar, application/gzip or multipart/form-data",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("unsupported_media_type", "a body with a Content-Encoding is not read")
    size = declared_length(request.headers.get("content-length", ""))
    if size is not None and size > max_bytes:
        raise too_large(max_bytes)
    form = CONTENT_TYPES[kind]
    return form, _boundary(options) if form is Form.MULTIPART else ""


def _boundary(options: str) -> str:
    for option in options.split(";"):
        name, _, value = option.strip().partition("=")
        boundary = value.strip('"')
        if name.lower() == "boundary" and 1 <= len(boundary) <= 70 and boundary.isascii():
            return boundary
    raise RequestError("malformed_request", "multipart/form-data comes without its boundary")


@asynccontextmanager
async def _in_time(deadline: float, timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise RequestError("receive_timeout", f"the body took over {timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise RequestError("malformed_json", "the client left before its body was there") from error


async def _after(first: bytes, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in parts:
        yield part


async def _write_body(
    parts: AsyncIterator[bytes],
    arrived: Arrived,
    verifier: Verifier,
    max_bytes: int,
    disk: Callable[[Callable[[], None]], Awaitable[None]],
) -> None:
    def write(part: bytes) -> None:
        incoming.write(part)
        verifier.update(part)

    incoming, pending = arrived.incoming, bytearray()
    async for part in parts:
        pending += part
        if incoming.bytes + len(pending) > max_bytes:
            raise too_large(max_bytes)
        if arrived.form is None and incoming.bytes == 0 and len(pending) >= 8:
            header_length(pending)  # refuses what is no adapter before the rest of it arrives
        if len(pending) >= WRITE_BYTES:
            await disk(partial(write, bytes(pending)))
            pending.clear()
    if pending:
        await disk(partial(write, bytes(pending)))


def too_large(max_bytes: int) -> RequestError:
    return RequestError("body_too_large", f"the file may have {max_bytes} bytes", limit=max_bytes)
