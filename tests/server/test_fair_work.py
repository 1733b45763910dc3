"""Long work is shared by key first, bounded by key, and dropped when nobody waits for it."""

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable

import pytest

from server.engine.errors import Draining, Overloaded
from server.fair_work import FairWork

WORD: contextvars.ContextVar[str] = contextvars.ContextVar("word")


class Bench:
    """One thread, held by a first piece of work until `open`; the order of the rest is noted."""

    def __init__(self, most_waiting: int = 100) -> None:
        self.fair = FairWork(1, "bench", most_waiting)
        self.order: list[str] = []
        self.gate = threading.Event()
        self.tasks = [self.start("gate", self.gate.wait)]

    def start(self, key: str, work: Callable[[], object]) -> "asyncio.Task[object]":
        return asyncio.ensure_future(self.fair.run(key, work))

    async def ask(self, key: str, count: int) -> "list[asyncio.Task[object]]":
        """So many pieces of work that note their names: a0, a1 …"""
        tasks = [
            self.start(key, lambda name=f"{key}{index}": self.order.append(name))  # type: ignore[misc]
            for index in range(count)
        ]
        self.tasks += tasks
        await asyncio.sleep(0)
        return tasks

    async def finish(self) -> list[str]:
        self.gate.set()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.fair.close()
        return self.order


def test_a_quiet_keys_work_comes_after_one_piece_of_a_flooding_key() -> None:
    async def run() -> None:
        bench = Bench()
        await bench.ask("a", 50)
        await bench.ask("b", 2)
        await bench.ask("", 2)
        assert (await bench.finish())[:8] == ["a0", "b0", "0", "a1", "b1", "1", "a2", "a3"]

    asyncio.run(run())


def test_long_work_of_one_key_does_not_fill_all_threads() -> None:
    async def run() -> None:
        fair, gate = FairWork(3, "threads", 100), threading.Event()
        long = [asyncio.ensure_future(fair.run("a", gate.wait)) for _ in range(10)]
        await asyncio.sleep(0)
        for _ in range(3):
            assert await asyncio.wait_for(fair.run("b", lambda: "short"), 30) == "short"
        gate.set()
        await asyncio.gather(*long)
        await fair.close()

    asyncio.run(run())


def test_a_key_with_too_much_waiting_is_refused_and_another_key_is_not() -> None:
    async def run() -> None:
        bench = Bench(most_waiting=3)
        tasks = await bench.ask("a", 4)
        assert isinstance(tasks[3].exception(), Overloaded)
        assert tasks[3].exception().details["retry_after_s"] >= 1  # type: ignore[union-attr]
        await bench.ask("b", 1)
        assert await bench.finish() == ["a0", "b0", "a1", "a2"]

    asyncio.run(run())


def test_retry_after_is_one_round_over_the_keys_at_the_measured_rate() -> None:
    async def run() -> None:
        bench = Bench(most_waiting=1)
        bench.fair.rate.note(1, 4.0)
        await bench.ask("a", 1)
        await bench.ask("b", 1)
        with pytest.raises(Overloaded) as refused:
            await bench.fair.run("a", time.monotonic)
        assert refused.value.details["retry_after_s"] == 8
        await bench.finish()

    asyncio.run(run())


def test_work_that_has_not_begun_is_dropped_with_its_task_and_its_place_is_free() -> None:
    async def run() -> None:
        bench = Bench(most_waiting=3)
        tasks = await bench.ask("a", 3)
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.sleep(0)
        assert bench.fair.waiting("a") == 1
        assert await bench.finish() == ["a1"]

    asyncio.run(run())


def test_a_task_that_is_cancelled_while_its_work_runs_ends_with_the_work() -> None:
    async def run() -> None:
        bench = Bench()
        await asyncio.sleep(0)
        bench.tasks[0].cancel()
        await bench.ask("b", 1)
        bench.tasks[0].cancel()
        await asyncio.sleep(0.01)
        assert not bench.tasks[0].done()
        assert bench.order == []
        assert await bench.finish() == ["b0"]
        assert bench.tasks[0].cancelled()

    asyncio.run(run())


def test_contextvars_results_and_errors_pass_through() -> None:
    async def run() -> None:
        fair = FairWork(2, "bench", 4)
        WORD.set("kept")
        assert await fair.run("a", WORD.get) == "kept"
        with pytest.raises(ZeroDivisionError):
            await fair.run("a", lambda: 1 // 0)
        await fair.close()

    asyncio.run(run())


def test_the_end_of_the_app_refuses_what_waits() -> None:
    async def run() -> None:
        bench = Bench()
        tasks = await bench.ask("a", 2)
        closed = asyncio.ensure_future(bench.fair.close())
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(task.exception(), Draining) for task in tasks)
        with pytest.raises(Draining):
            await bench.fair.run("b", lambda: None)
        assert not closed.done()  # the first piece runs, and may use what is closed next
        bench.gate.set()
        await closed
        assert await bench.finish() == []

    asyncio.run(run())
