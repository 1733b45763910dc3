"""An uploaded file: streamed to the disk while it is hashed, never whole in memory."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from adapters.errors import Invalid
from adapters.format import header_length
from adapters.store import BlobStore, Incoming
from server.errors import RequestError

WRITE_BYTES = 1 << 20  # written at once, in a worker thread
CONTENT_TYPES = {"application/octet-stream", "application/vnd.safetensors"}


@asynccontextmanager
async def upload(
    request: Request, store: BlobStore, max_bytes: int, timeout_s: float
) -> AsyncIterator[Incoming]:
    """The body as an Incoming, discarded at the end of the block unless it was stored.

    Raises RequestError; Invalid where the first bytes show that it is no adapter file, or where
    the bytes are not those that the headers declare; StorageFull or ReadOnly.
    """
    _check_headers(request, max_bytes)
    incoming = await asyncio.to_thread(store.incoming)
    try:
        await _receive(request, incoming, max_bytes, timeout_s)
        _check_digest(request, incoming)
        yield incoming
    finally:
        await asyncio.to_thread(incoming.discard)


def _check_headers(request: Request, max_bytes: int) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in CONTENT_TYPES:
        raise RequestError("unsupported_media_type", "the body must be application/octet-stream")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("unsupported_media_type", "a body with a Content-Encoding is not read")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large(max_bytes)


async def _receive(request: Request, incoming: Incoming, max_bytes: int, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await _write_body(request, incoming, max_bytes)
    except TimeoutError as error:
        raise RequestError("receive_timeout", f"the body took over {timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise RequestError("malformed_json", "the client left before its body was there") from error


async def _write_body(request: Request, incoming: Incoming, max_bytes: int) -> None:
    pending = bytearray()
    async for part in request.stream():
        pending += part
        if incoming.bytes + len(pending) > max_bytes:
            raise too_large(max_bytes)
        if incoming.bytes == 0 and len(pending) >= 8:
            header_length(pending)  # refuses what is no adapter before the rest of it arrives
        if len(pending) >= WRITE_BYTES:
            await asyncio.to_thread(incoming.write, bytes(pending))
            pending.clear()
    if pending:
        await asyncio.to_thread(incoming.write, bytes(pending))


def _check_digest(request: Request, incoming: Incoming) -> None:
    """Content-Digest (RFC 9530) and x-content-sha256, where sent, must be the bytes'."""
    digest = incoming.digest.removeprefix("sha256:")
    declared = [request.headers.get("x-content-sha256", digest).lower().removeprefix("sha256:")]
    for part in ",".join(request.headers.getlist("content-digest")).split(","):
        algorithm, _, value = part.strip().partition("=")
        if algorithm.lower() == "sha-256":
            declared.append(_hex(value))
    if any(value != digest for value in declared):
        raise Invalid("digest_mismatch", "the bytes are not those of the declared digest")


def _hex(structured: str) -> str:
    """`:base64:` as hex; what is not that is no digest."""
    try:
        return base64.b64decode(structured.strip(":"), validate=True).hex()
    except ValueError:  # not base64, or not even ASCII
        return ""


def too_large(max_bytes: int) -> RequestError:
    return RequestError("body_too_large", f"the file may have {max_bytes} bytes", limit=max_bytes)
