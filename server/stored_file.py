"""A stored adapter file as an answer: streamed from the disk, hashed while it is sent."""

import asyncio
import base64
import hashlib
import logging
import os
from contextlib import ExitStack

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters.store import BlobStore
from adapters.versions import Version
from server.conditions import etag
from server.heads import HEADERS_ONLY

log = logging.getLogger("trunkline.files")

READ_BYTES = 256 << 10
# What a bare name means can change at any time
CACHED = {"cache-control": "private, no-cache"}


class StoredFile(Response):
    """The bytes of one version. The file is open from the start, so a delete can't cut it off.

    The last part is sent only when the digest is right: a client never takes a damaged file for a
    whole one, since the connection closes before Content-Length is reached.
    """

    def __init__(self, store: BlobStore, version: Version, held: ExitStack) -> None:
        """`held` is closed when the answer has ended.

        Raises Damaged where the file is gone, Unreadable where it can't be opened now.
        """
        super().__init__(headers=_headers(version), media_type="application/octet-stream")
        self.headers["content-length"] = str(version.bytes)
        self._version = version
        self._file = store.open(version.digest)
        self._held = held
        held.callback(os.close, self._file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            if scope.get(HEADERS_ONLY):
                await send({"type": "http.response.body", "body": b""})
            else:
                await self._send_bytes(send)
        finally:
            self._held.close()

    async def _send_bytes(self, send: Send) -> None:
        hashed = hashlib.sha256()
        left = self._version.bytes
        while left:
            part = await asyncio.to_thread(self._read, min(left, READ_BYTES), hashed)
            left -= len(part)
            if not part or (left == 0 and f"sha256:{hashed.hexdigest()}" != self._version.digest):
                log.warning("%s was not sent whole: it is damaged", self._version.digest)
                return
            await send({"type": "http.response.body", "body": part, "more_body": left > 0})

    def _read(self, size: int, hashed: "hashlib._Hash") -> bytes:
        part = os.read(self._file, size)
        hashed.update(part)
        return part


def _headers(version: Version) -> dict[str, str]:
    """The digest in both of RFC 9530's headers: there is no content coding and no range."""
    sha256 = bytes.fromhex(version.digest.removeprefix("sha256:"))
    digest = f"sha-256=:{base64.b64encode(sha256).decode()}:"
    name = f"{version.name.replace('/', '-')}-{version.number}.safetensors"
    return {
        "etag": etag(version.number),
        "content-digest": digest,
        "repr-digest": digest,
        "content-disposition": f'attachment; filename="{name}"',
        "x-trunkline-adapter": f"{version.name}@{version.number}",
        "accept-ranges": "none",
    } | CACHED
