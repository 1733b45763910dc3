"""Large bodies: a silent head takes nothing from others, and memory and parsing go by key first."""

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from conftest import Served

from server import body_memory
from server.bodies import LARGE
from server.body_memory import PIECE, BodyMemory, LargeBody
from server.engine.errors import Overloaded
from server.errors import RequestError
from server.turns import BODIES, Turns

MB = 1 << 20
LARGEST = 8 * MB
SHARE = BODIES * LARGEST // 2  # of one key alone


class Sender:
    """A request with a large body: it receives a piece whenever it may and is told to."""

    def __init__(self, turns: Turns, key: str = "", declared: int = LARGEST) -> None:
        self.turns, self.key, self.declared = turns, key, declared
        self.pieces: asyncio.Queue[int] = asyncio.Queue()
        self.received = 0
        self.task = asyncio.ensure_future(self._receive())

    async def _receive(self) -> None:
        async with self.turns.take(self.declared, self.key) as body:
            while self.received < self.declared:
                await self.turns.memory.room(body)
                size = await self.pieces.get()
                self.received += size
                self.turns.memory.received(body, size)
            await self.turns.parse(body, lambda: None)

    def send(self, size: int) -> None:
        """So many bytes, in pieces as a connection reads them."""
        while size > 0:
            self.pieces.put_nowait(min(PIECE, size))
            size -= PIECE


async def settle() -> None:
    for _ in range(400):
        await asyncio.sleep(0)


async def left(*senders: Sender) -> None:
    for sender in senders:
        sender.task.cancel()
    await asyncio.gather(*(sender.task for sender in senders), return_exceptions=True)


def test_heads_without_bodies_hold_nothing_and_keep_no_body_of_their_key_waiting() -> None:
    async def run() -> None:
        turns = Turns(2.0, LARGEST)
        silent = [Sender(turns) for _ in range(60)]
        await settle()
        assert turns.memory.held == 0
        whole = Sender(turns)
        whole.send(LARGEST)
        await asyncio.wait_for(whole.task, 30)
        assert not any(sender.task.done() for sender in silent)
        await left(*silent)

    asyncio.run(run())


def test_memory_is_bounded_by_key_and_another_keys_body_is_read_to_its_end() -> None:
    async def run() -> None:
        turns = Turns(2.0, LARGEST)
        flood = [Sender(turns, "flood") for _ in range(20)]
        for sender in flood:
            sender.send(LARGEST - MB)  # none comes to its end
        await settle()
        held = turns.memory.held
        assert SHARE - LARGEST < held <= SHARE + LARGEST + len(flood) * PIECE
        quiet = Sender(turns, "quiet")
        quiet.send(LARGEST)
        await asyncio.wait_for(quiet.task, 30)
        assert not any(sender.task.done() for sender in flood)
        await left(*flood)
        assert turns.memory.held == 0

    asyncio.run(run())


def test_bodies_that_fill_the_memory_all_come_to_their_end() -> None:
    async def run() -> None:
        turns = Turns(1e9, LARGEST)
        senders = [Sender(turns, f"key {index % 12}") for index in range(36)]
        most = 0
        for _ in range(LARGEST // PIECE + 1):
            for sender in senders:
                sender.send(PIECE)
            await asyncio.sleep(0)
            most = max(most, turns.memory.held)
        await asyncio.wait_for(asyncio.gather(*(sender.task for sender in senders)), 60)
        assert most <= turns.memory.limit + 12 * LARGEST
        assert turns.memory.held == 0

    asyncio.run(run())


def test_a_body_that_stalls_gives_up_its_place_where_others_need_it(monkeypatch) -> None:
    monkeypatch.setattr(body_memory, "STALLED_S", 0.0)
    monkeypatch.setattr(body_memory, "RECHECK_S", 0.01)

    async def run() -> None:
        turns = Turns(1e9, LARGEST)
        stalled = [Sender(turns) for _ in range(10)]
        for sender in stalled:
            sender.send(LARGEST - MB)
        await settle()
        whole = Sender(turns)
        whole.send(LARGEST)
        await asyncio.wait_for(whole.task, 30)
        ended = [sender.task for sender in stalled if sender.task.done()]
        assert ended
        for task in ended:
            error = task.exception()
            assert isinstance(error, RequestError)
            assert error.code == "receive_timeout"
        await left(*stalled)

    asyncio.run(run())


def test_the_parser_serves_keys_by_their_bytes_and_refuses_a_backlog_of_the_keys_own() -> None:
    async def run() -> None:
        turns, order, gate = Turns(2.0, LARGEST), [], threading.Event()

        async def parse(name: str, key: str, size: int) -> None:
            async with turns.take(size, key) as body:
                turns.memory.received(body, size)
                await turns.parse(body, lambda: order.append(name) or gate.wait())

        turns._parser.rate.note(10 * MB, 1.0)  # 10 MB a second
        tasks = [asyncio.ensure_future(parse("first", "flood", MB))]
        await settle()
        tasks += [asyncio.ensure_future(parse(f"flood {i}", "flood", 4 * MB)) for i in range(5)]
        await settle()
        with pytest.raises(Overloaded) as refused:
            await parse("late", "flood", MB)  # 21 MB wait
        assert refused.value.details["retry_after_s"] == 1
        tasks += [asyncio.ensure_future(parse(f"quiet {i}", "quiet", MB)) for i in range(4)]
        await settle()
        gate.set()
        await asyncio.gather(*tasks)
        assert order[:6] == ["first", "quiet 0", "flood 0", "quiet 1", "quiet 2", "quiet 3"]
        await turns.close()

    asyncio.run(run())


def test_room_goes_to_the_body_that_waited_first() -> None:
    async def run() -> None:
        memory = BodyMemory(4 * PIECE)
        bodies = [LargeBody(memory, "", MB, lambda: None) for _ in range(4)]
        for body in bodies:
            memory.enter(body)
        for body in bodies[:2]:
            memory.received(body, PIECE)
        waits = [asyncio.ensure_future(memory.room(body)) for body in bodies[2:]]
        await settle()
        assert not any(wait.done() for wait in waits)
        memory.leave(bodies[1])
        await settle()
        assert [wait.done() for wait in waits] == [True, False]
        waits[1].cancel()

    asyncio.run(run())


@contextmanager
def silent_heads(server: Served, count: int) -> Iterator[None]:
    """Connections that announce 8 MB each and send nothing."""
    address = server.url.removeprefix("http://").split(":")
    head = b"POST /encode HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    with ExitStack() as stack:
        for _ in range(count):
            connection = socket.create_connection((address[0], int(address[1])), timeout=30)
            stack.enter_context(connection).sendall(head + b"content-length: 8000000\r\n\r\n")
        yield


def test_a_burst_of_large_bodies_is_answered_whole_beside_silent_heads(
    tiny_server: Served,
) -> None:
    """The rows are too many for a request: this answer shows that all of them were read."""
    raw = json.dumps({"inputs": [[1] * 8] * 4_000}).encode()
    assert len(raw) > LARGE
    headers = {"content-type": "application/json"}
    with silent_heads(tiny_server, 60), tiny_server.client() as client:
        client.get("/health")
        with ThreadPoolExecutor(24) as senders:
            answers = list(
                senders.map(
                    lambda _: client.post("/encode", content=raw, headers=headers), range(24)
                )
            )
        assert client.get("/health").status_code == 200
    seen = Counter((answer.status_code, answer.json()["error"]["code"]) for answer in answers)
    assert seen == {(413, "too_many_inputs"): 24}
