"""A poisoned row, too little memory, a dead or stuck engine, a stopped process: real processes."""

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_client import wait_until
from conftest import Serve, Served, start_server

from server.engine.engine import TICK_S

HERE = Path(__file__).parent
POISON, HANG, KILL, HUNGRY, SLOW, PAUSE, BREAK = 7, 8, 9, 10, 11, 12, 13
GOOD = [[20, 21, 22], [23], [24, 25]]
ENGINE_LOST = 70
UNREADY_WITHIN_S = 2.0  # the promise
TRIES = 5  # of what a busy machine may be late for


@pytest.fixture
def faulty(tiny_backbone: Path, tmp_path: Path) -> Iterator[Served]:
    yield from running(HERE / "faulty_server.py", tiny_backbone, tmp_path)


@pytest.fixture(scope="module")
def surviving(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from running(HERE / "faulty_server.py", tiny_backbone, tmp_path_factory.mktemp("faulty"))


@pytest.fixture
def shared(surviving: Served) -> Served:
    """For the faults that a server survives: ready again, whatever the test before did to it."""
    with surviving.client() as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
    return surviving


@pytest.fixture
def impatient(tiny_backbone: Path, tmp_path: Path) -> Iterator[Served]:
    yield from running(HERE / "impatient_server.py", tiny_backbone, tmp_path)


def running(script: Path, backbone: Path, folder: Path) -> Iterator[Served]:
    served = start_server(folder / "log", backbone, "--dtype", "float32", script=script)
    yield served
    served.process.kill()
    served.process.wait()


def ask(client: httpx.Client, inputs: list[list[int]]) -> httpx.Response:
    return client.post("/encode", json={"adapter": "plain", "inputs": inputs})


def test_one_poisoned_row_in_any_of_sixteen_places_errs_alone(shared: Served) -> None:
    good = [[20 + n % 5] * (1 + n % 4) for n in range(15)]
    with shared.client() as client:
        expected = [row["embedding"] for row in ask(client, good).json()["data"]]
        for place in range(len(good) + 1):
            answer = ask(client, [*good[:place], [POISON], *good[place:]])
            assert answer.status_code == 200
            rows = answer.json()["data"]
            assert rows.pop(place)["error"]["code"] == "internal_error"
            for row, vector in zip(rows, expected, strict=True):
                assert row["embedding"] == pytest.approx(vector, abs=1e-5)
        answer = ask(client, [[POISON]])
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert client.get("/ready").status_code == 200


def test_a_batch_without_memory_is_run_in_halves(shared: Served) -> None:
    with shared.client() as client:
        answer = ask(client, [[HUNGRY], *GOOD, [HUNGRY, 1]])
        assert answer.status_code == 200
        assert not [row for row in answer.json()["data"] if "error" in row]


def ask_behind(
    served: Served, threads: ThreadPoolExecutor, first: list[int], *others: list[int]
) -> list[Future[httpx.Response]]:
    """A request whose batch is on the device, and others that wait behind it, a row each."""

    def engine() -> dict[str, Any]:
        state: dict[str, Any] = client.get("/debug/engine").json()
        return state

    def send(row: list[int]) -> Future[httpx.Response]:
        return threads.submit(httpx.post, f"{served.url}/encode", json={"inputs": row}, timeout=60)

    with served.client() as client:
        asked = [send(first)]
        wait_until(lambda: engine()["batch_s"] is not None)
        for row in others:
            asked.append(send(row))
            wait_until(lambda: engine()["waiting_rows"] == len(asked) - 1)
    return asked


def assert_told_that_the_engine_failed(answer: httpx.Response) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "not_ready")
    assert "engine has failed" in error["message"]
    assert int(answer.headers["retry-after"]) > 0


def test_a_dead_engine_fails_who_waits_and_ends_the_process_with_its_own_code(
    faulty: Served,
) -> None:
    with faulty.client() as client, faulty.client() as other:
        assert_told_that_the_engine_failed(ask(client, [[KILL]]))
        with suppress(httpx.TransportError):  # it has ended, or says that it is not ready
            assert other.get("/ready").status_code == 503
    assert faulty.process.wait(20) == ENGINE_LOST


def test_a_broken_accelerator_fails_who_waits_and_ends_the_process_with_its_own_code(
    faulty: Served,
) -> None:
    with ThreadPoolExecutor(3) as threads:
        slow, *others = ask_behind(faulty, threads, [SLOW], [BREAK], [20, 21])
        assert slow.result().status_code == 200
        for other in others:
            assert_told_that_the_engine_failed(other.result())
    assert faulty.process.wait(20) == ENGINE_LOST
    assert "run in halves" not in faulty.log.read_text()  # it would answer nothing


def test_a_batch_that_stays_stuck_fails_who_waits_and_ends_the_process_with_its_own_code(
    impatient: Served,
) -> None:
    with ThreadPoolExecutor(3) as threads, impatient.client() as client:
        asked = ask_behind(impatient, threads, [HANG], [20], [21, 22])
        wait_until(lambda: client.get("/ready").status_code == 503)
        assert not any(each.done() for each in asked)
        for each in asked:
            assert_told_that_the_engine_failed(each.result())
    assert impatient.process.wait(20) == ENGINE_LOST


def test_a_stuck_engine_is_not_ready_while_health_answers(faulty: Served) -> None:
    with faulty.client() as client, ThreadPoolExecutor(1) as threads:
        hung = threads.submit(ask, client, [[HANG]])
        with faulty.client() as other:
            wait_until(lambda: other.get("/ready").status_code == 503)
            assert other.get("/health").status_code == 200
            engine = other.get("/debug/engine").json()
            assert (engine["ready"], engine["tokens_admitted"], engine["leases"]) == (False, 1, 1)
            assert engine["batch_s"] > 1
        faulty.process.kill()
        with pytest.raises(httpx.TransportError):
            hung.result()


def ready_while_stuck(faulty: Served, threads: ThreadPoolExecutor) -> tuple[float, float]:
    """How long /ready went on to be 200 after a batch was stuck: seconds by the clock, at most,
    and by the ticks that the server judges by, at least. Whatever delays this client or the server
    makes the first more, and the second less."""
    with faulty.client() as client, faulty.client() as other:
        wait_until(lambda: other.get("/ready").status_code == 200)
        began = time.monotonic()
        paused = threads.submit(ask, client, [[PAUSE]])
        wait_until(lambda: other.get("/debug/engine").json()["batch_s"] is not None)
        first = last = now = ticks(other)
        while other.get("/ready").status_code == 200 and not paused.done():
            last, now = now, ticks(other)
        spent_s = time.monotonic() - began
        assert paused.result().status_code == 200
    return spent_s, (last - first) * TICK_S


def ticks(client: httpx.Client) -> int:
    """Of the watch, each of which observes the event loop's lag."""
    return counted(client, "trunkline_event_loop_lag_seconds_count")


def counted(client: httpx.Client, metric: str) -> int:
    found = re.search(rf"^{metric} (\S+)", client.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


@pytest.mark.alone
def test_a_stuck_engine_is_not_ready_within_2_s(shared: Served) -> None:
    with ThreadPoolExecutor(1) as threads:
        for _ in range(TRIES):
            by_the_clock_s, by_ticks_s = ready_while_stuck(shared, threads)
            assert by_ticks_s < UNREADY_WITHIN_S
            if by_the_clock_s < UNREADY_WITHIN_S:
                break
        assert by_the_clock_s < UNREADY_WITHIN_S


def test_a_batch_that_takes_long_but_gets_on_is_not_stuck(shared: Served) -> None:
    with shared.client() as client, ThreadPoolExecutor(1) as threads:
        slow = threads.submit(ask, client, [[SLOW]])
        seen = []
        with shared.client() as other:
            while not slow.done():
                seen.append(other.get("/ready").status_code)
                time.sleep(0.05)
        assert slow.result().status_code == 200
        assert set(seen) == {200}


def test_a_client_that_leaves_behind_a_large_body_has_its_rows_dropped(shared: Served) -> None:
    rows = [[20] * 64] * 1500  # 290 kB: above what uvicorn reads ahead of its application
    body = json.dumps({"inputs": rows}).encode()
    head = b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    host, port = shared.url.removeprefix("http://").split(":")
    with shared.client() as client, shared.client() as other, ThreadPoolExecutor(1) as threads:
        before = counted(other, "trunkline_tokens_total")
        slow = threads.submit(ask, client, [[SLOW]])  # so that nothing of it can be run at once
        wait_until(lambda: other.get("/debug/engine").json()["batch_s"] is not None)
        with socket.create_connection((host, int(port)), timeout=30) as leaving:
            leaving.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: other.get("/debug/engine").json()["tokens_admitted"] > 96_000)
        wait_until(lambda: 'route="/encode",status="499"' in other.get("/metrics").text)
        assert slow.result().status_code == 200
        wait_until(lambda: other.get("/debug/engine").json()["tokens_admitted"] == 0)
        assert counted(other, "trunkline_tokens_total") == before + 1


def test_a_process_that_was_stopped_goes_on(tiny_backbone: Path, serve: Serve) -> None:
    served = serve(tiny_backbone, "--dtype", "float32")
    served.process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    served.process.send_signal(signal.SIGCONT)
    with served.client() as client:
        assert client.get("/ready").status_code == 200
        assert ask(client, GOOD).status_code == 200


def test_a_second_sigterm_ends_it_now(tiny_backbone: Path, serve: Serve) -> None:
    served = serve(tiny_backbone, "--drain-window-s", "600")
    served.process.send_signal(signal.SIGTERM)
    with served.client() as client:
        wait_until(lambda: client.get("/ready").status_code == 503)
    with pytest.raises(subprocess.TimeoutExpired):
        served.process.wait(0.2)
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(10) == 128 + signal.SIGTERM
