"""An HTTP client that takes little of the machine: requests made beforehand, bytes back.

It shares the cores with the server, so it parses no body while the clock runs.
"""

import asyncio
import json
import random
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import uvloop

from loadtest.bench.process import Running

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A whole request as bytes, and the tokens it has."""

    request: bytes
    tokens: int


@dataclass(frozen=True)
class Answer:
    status: int
    head: bytes
    body: bytes

    def header(self, name: str) -> str:
        """Its value; `name` in lower case. Raises KeyError."""
        before = f"\r\n{name}:".encode()
        start = self.head.lower().find(before)
        if start < 0:
            raise KeyError(name)
        start += len(before)
        return self.head[start : self.head.index(b"\r\n", start)].strip().decode()


class Refused(Exception):
    """An answer other than 200 where every one must be."""


def post(
    path: str,
    body: dict[str, Any],
    accept: str = "application/json",
    tokens: int = 0,
    key: str | None = None,
) -> Question:
    raw = json.dumps(body, separators=(",", ":")).encode()
    return Question(_request("POST", path, raw, "application/json", accept, key), tokens)


def get(path: str, key: str) -> bytes:
    return _request("GET", path, b"", "application/json", "*/*", key)


def put(path: str, file: bytes) -> bytes:
    return _request("PUT", path, file, "application/octet-stream", "application/json")


def _request(
    method: str, path: str, body: bytes, kind: str, accept: str, key: str | None = None
) -> bytes:
    authorization = f"authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: {kind}\r\naccept: {accept}\r\n"
        f"{authorization}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection(asyncio.Protocol):
    """One connection that is kept: one request at a time. Streams would take twice the time."""

    def __init__(self) -> None:
        self.closed = False  # by the server, as it does with those that were idle for long
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._answer: asyncio.Future[Answer] | None = None

    @classmethod
    async def open(cls, server: Running) -> "Connection":
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, server.host, server.port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by what it does

    def ask(self, request: bytes) -> "asyncio.Future[Answer]":
        """Answers must have a content-length, as trunkline's have. Raises ConnectionError."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = bytes(self._received[:end])
        answer = Answer(int(head[9:12]), head, b"")
        size = end + int(answer.header("content-length"))
        if len(self._received) < size or self._answer is None:
            return
        body = bytes(self._received[end:size])
        del self._received[:size]
        waiting, self._answer = self._answer, None
        if not waiting.done():
            waiting.set_result(Answer(answer.status, head, body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("the server closed the connection"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def on_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run it on the event loop that uvicorn uses too."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def ask_one(server: Running, request: bytes) -> Answer:
    connection = await Connection.open(server)
    try:
        return await connection.ask(request)
    finally:
        connection.close()


def repeated(questions: Sequence[Question], tokens_per_s: float, window_s: float) -> list[Question]:
    """All of them again and again, for about `window_s` at this rate; once at least."""
    total = sum(question.tokens for question in questions)
    return list(questions) * max(1, round(window_s * tokens_per_s / total))


async def saturate(server: Running, questions: Sequence[Question], connections: int) -> float:
    """Tokens answered a second: every question once, in a closed loop, to the last answer.

    A window of time would not do: the engine is fair, so requests that came together are answered
    together, and a window's end cuts off a whole wave of them. Raises Refused where an answer is
    not 200.
    """
    left = iter(questions)

    async def keep_asking(connection: Connection) -> None:
        for question in left:
            answer = await connection.ask(question.request)
            if answer.status != 200:
                raise Refused(f"{answer.status} {answer.body[:300]!r}")

    opened = [await Connection.open(server) for _ in range(connections)]
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for connection in opened:
            tasks.create_task(keep_asking(connection))
    spent = time.perf_counter() - began
    for connection in opened:
        connection.close()
    return sum(question.tokens for question in questions) / spent


async def lone_latency(server: Running, question: Question, count: int) -> list[float]:
    """Seconds of `count` requests, one after the other on one connection."""
    connection = await Connection.open(server)
    spent = []
    for _ in range(count):
        began = time.perf_counter()
        answer = await connection.ask(question.request)
        spent.append(time.perf_counter() - began)
        if answer.status != 200:
            raise Refused(f"{answer.status} {answer.body[:300]!r}")
    connection.close()
    return spent


@dataclass(frozen=True)
class Sent:
    """One request of an open loop; times in seconds from the loop's beginning."""

    index: int  # of the question
    answer: Answer
    due: float
    done: float

    @property
    def seconds(self) -> float:
        """From when it was due, whenever it was sent."""
        return self.done - self.due


def arrivals(rate: float, begins_s: float, ends_s: float, rng: random.Random) -> Iterator[float]:
    """The times of a Poisson process of `rate` a second."""
    due = begins_s + rng.expovariate(rate)
    while due < ends_s:
        yield due
        due += rng.expovariate(rate)


async def steady(
    server: Running, questions: Sequence[Question], rate: float, window_s: float, seed: int
) -> list[Sent]:
    """An open loop of `rate` requests a second."""
    rng = random.Random(seed)
    return await open_loop(server, questions, arrivals(rate, 0.0, window_s, rng), rng)


async def open_loop(
    server: Running, questions: Sequence[Question], dues: Iterable[float], rng: random.Random
) -> list[Sent]:
    """Any of the questions at each of these times (s, ascending), to the last answer."""
    idle: list[Connection] = []
    sent: list[Sent] = []
    began = time.perf_counter()

    async def ask(index: int, due: float) -> None:
        while idle and idle[-1].closed:
            idle.pop().close()
        connection = idle.pop() if idle else await Connection.open(server)
        answer = await connection.ask(questions[index].request)
        sent.append(Sent(index, answer, due, time.perf_counter() - began))
        idle.append(connection)

    async with asyncio.TaskGroup() as tasks:
        for due in dues:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tasks.create_task(ask(rng.randrange(len(questions)), due))
    for connection in idle:
        connection.close()
    return sent
