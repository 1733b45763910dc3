"""Large bodies take turns, and whoever would wait for too long is told so at once."""

import asyncio
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Served

from server import turns
from server.bodies import LARGE
from server.engine.errors import Overloaded
from server.turns import AT_ONCE, Turns

MB = 1_000_000


class Body:
    """One that takes a turn and keeps it until told to end."""

    def __init__(self, taken: Turns, size: int = MB) -> None:
        self.reading = False
        self.end = asyncio.Event()
        self.task = asyncio.ensure_future(self._read(taken, size))

    async def _read(self, taken: Turns, size: int) -> None:
        async with taken.take(size):
            self.reading = True
            await self.end.wait()


async def reading(bodies: list[Body]) -> int:
    for _ in range(5):
        await asyncio.sleep(0)
    return sum(body.reading and not body.end.is_set() for body in bodies)


def test_only_a_few_are_read_at_once_and_each_end_lets_the_next_in() -> None:
    async def run() -> None:
        taken = Turns(most_s=2.0)
        bodies = [Body(taken) for _ in range(AT_ONCE + 6)]
        for ended in range(6):
            assert await reading(bodies) == AT_ONCE
            bodies[ended].end.set()
        for body in bodies:
            body.end.set()
            await body.task

    asyncio.run(run())


def test_who_sends_slowly_keeps_nobody_waiting_and_ends_no_turn_twice(monkeypatch) -> None:
    monkeypatch.setattr(turns, "LONGEST_S", 0.05)

    async def run() -> None:
        taken = Turns(most_s=2.0)
        slow = [Body(taken) for _ in range(AT_ONCE)]
        assert await reading(slow) == AT_ONCE
        await asyncio.wait_for(asyncio.gather(*(self_ending(taken) for _ in range(3))), 5)
        for body in slow:
            body.end.set()
            await body.task
        monkeypatch.setattr(turns, "LONGEST_S", 60)
        bodies = [Body(taken) for _ in range(AT_ONCE + 1)]
        assert await reading(bodies) == AT_ONCE
        for body in bodies:
            body.end.set()
            await body.task

    async def self_ending(taken: Turns) -> None:
        async with taken.take(MB):
            pass

    asyncio.run(run())


def test_a_body_that_would_wait_for_too_long_is_refused_until_others_are_done() -> None:
    async def run() -> None:
        taken = Turns(most_s=2.0)
        taken.note(10 * MB, time.monotonic() - 1.0)  # 10 MB a second
        bodies = [Body(taken, 5 * MB) for _ in range(5)]
        await reading(bodies)
        with pytest.raises(Overloaded) as refused:
            async with taken.take(MB):
                pass
        assert refused.value.details["retry_after_s"] == 1
        for body in bodies[:2]:
            body.end.set()
            await body.task
        async with taken.take(MB):
            pass
        bodies[-1].task.cancel()  # its client left while it waited, or while it read
        for body in bodies[2:4]:
            body.end.set()
        await asyncio.gather(*(body.task for body in bodies), return_exceptions=True)
        assert taken._bytes == 0

    asyncio.run(run())


def test_a_burst_of_large_bodies_is_answered_whole_and_the_server_lives_beside_it(
    tiny_server: Served,
) -> None:
    """Rows too many for a request, so that what is told of them shows that all was read."""
    rows = [[1] * 8] * 20_000
    raw = json.dumps({"inputs": rows}).encode()
    assert len(raw) > LARGE
    headers = {"content-type": "application/json"}
    with tiny_server.client() as client, ThreadPoolExecutor(24) as senders:
        posts = senders.map(
            lambda _: client.post("/encode", content=raw, headers=headers), range(48)
        )
        answers = list(posts)
        assert client.get("/health").status_code == 200
    seen = Counter((answer.status_code, answer.json()["error"]["code"]) for answer in answers)
    assert set(seen) <= {(413, "too_many_inputs"), (503, "overloaded")}
    assert seen[413, "too_many_inputs"] >= AT_ONCE
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
