"""Requests of a soak over a few kept connections, counted by what became of them."""

import asyncio
import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from loadtest.bench.client import Answer, Connection
from loadtest.bench.process import Running

PATIENCE_S = 120.0  # for one answer: the machine may be busy with other things
BUSY = {429, 503}  # answers of a server that is busy: not wrong, and counted apart
OCTETS = "application/octet-stream"
JSON = "application/json"


class Wire:
    """Sends requests; every answer is counted as right, refused (BUSY), failed or wrong."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []  # the first of them, in words
        self._idle: list[Connection] = []

    async def ask(self, request: bytes) -> Answer | None:
        """The answer; None where none came, which is counted as failed."""
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                connection.close()
                continue
            try:
                return await self._ask(connection, request)
            except ConnectionError:
                continue  # the server may close an idle connection at the moment it is used
            except TimeoutError as error:
                self.fault("failed", f"no answer to {_line(request)}: {error!r}")
                return None
        try:
            return await self._ask(await Connection.open(self.server), request)
        except OSError as error:  # TimeoutError and ConnectionError are of its kind
            self.fault("failed", f"no answer to {_line(request)}: {error!r}")
            return None

    async def _ask(self, connection: Connection, request: bytes) -> Answer:
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await connection.ask(request)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return answer

    async def demand(self, request: bytes, statuses: Collection[int]) -> Answer | None:
        """The answer with one of these statuses; None for any other, which is counted."""
        answer = await self.ask(request)
        if answer is None:
            return None
        self.counts[f"status {answer.status}"] += 1
        if answer.status in statuses:
            return answer
        if answer.status in BUSY:
            self.counts["refused"] += 1
        else:
            what = f"{answer.status} to {_line(request)}: {answer.body[:200]!r}"
            self.fault("failed", what)
        return None

    def right(self) -> None:
        self.counts["right"] += 1

    def fault(self, kind: str, sentence: str) -> None:
        self.counts[kind] += 1
        if len(self.faults) < 50:
            self.faults.append(f"{kind}: {sentence}")

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def request(
    method: str,
    path: str,
    key: str,
    body: bytes | dict[str, Any] = b"",
    kind: str = JSON,
    accept: str = JSON,
    **headers: str,
) -> bytes:
    """A whole request; keywords become headers, `if_match` the header if-match."""
    data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: soak",
        f"authorization: Bearer {key}",
        f"accept: {accept}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    if data or method in ("PUT", "POST"):
        lines += [f"content-type: {kind}", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


def _line(request: bytes) -> str:
    return request.split(b" HTTP/1.1", 1)[0].decode()
