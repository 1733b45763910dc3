"""Locust itself against real servers, in processes of its own: it patches where it is imported."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Served

ROOT = Path(__file__).parent.parent.parent
LOCUST = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py")]

pytest.importorskip("zmq", reason="the extra loadtest is not installed: no Locust")


@dataclasses.dataclass(frozen=True)
class Run:
    exit_code: int
    summary: dict[str, Any]
    output: str


def run(url: str, *flags: str | Path | float) -> Run:
    command = [*LOCUST, "--host", url, "--headless", "--only-summary", *map(str, flags)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ
    )
    last = done.stdout.rstrip().rpartition("\n")[2]
    assert last.startswith("{"), done.stdout + done.stderr
    return Run(done.returncode, json.loads(last), done.stdout + done.stderr)


def test_a_closed_loop_with_swaps_is_answered_rightly_by_every_route(
    tiny_server: Served, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    done = run(
        tiny_server.url, "-u", 6, "-t", "4s", "--adapters", 4, "--swaps", 600, "--check-share", 0.1,
        "--mix", "encode=1,critic=1,classify=1,fan-out=1,openai=1", "--report", report,
    )  # fmt: skip
    summary = done.summary
    assert done.exit_code == 0, done.output
    assert (summary["failed"], summary["wrong"], summary["admin_failed"]) == (0, 0, 0)
    assert set(summary["by_kind_ms"]) == {"encode", "critic", "classify", "fan-out", "openai"}
    assert summary["digests_judged"] > 0
    assert summary["samples_compared"] > 0
    assert summary["admin_deeds"] > 0
    page = report.read_text("utf-8")
    assert page.count("<svg") >= 6
    assert "waiting_tokens" in page  # the server's own metrics
    # Self-contained: nothing is loaded from anywhere
    assert not re.search(r"<(script|link|img)|url\((?!#)", page)
    left = httpx.get(f"{tiny_server.url}/adapters", params={"limit": 1000}).json()["data"]
    assert not [row["name"] for row in left if row["name"].startswith("load/")]


@pytest.mark.alone
def test_an_open_loop_sends_what_is_due_and_a_missed_objective_is_the_exit_code(
    tiny_server: Served, tmp_path: Path
) -> None:
    done = run(
        tiny_server.url, "--rate", 40, "--arrivals", "constant", "-t", "3s", "--adapters", 2,
        "--p99-ms", 0.001, "--report", tmp_path / "report.html",
    )  # fmt: skip
    assert done.exit_code == 1
    assert len(done.summary["breaches"]) == 1
    assert done.summary["breaches"][0].startswith("p99 ")
    assert (done.summary["failed"], done.summary["wrong"]) == (0, 0)
    # 40 a second for 3 s, less what was due before the users were there
    assert 80 <= done.summary["requests"] <= 121


@pytest.mark.alone
def test_two_workers_share_the_load_and_know_of_each_others_swaps(
    tiny_server: Served, tmp_path: Path
) -> None:
    recording = tmp_path / "run.json"
    done = run(
        tiny_server.url, "--processes", 2, "--rate", 40, "--arrivals", "constant", "-t", "3s",
        "--adapters", 2, "--swaps", 600, "--report", "", "--recording", recording,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (done.summary["failed"], done.summary["wrong"]) == (0, 0)
    assert 80 <= done.summary["requests"] <= 122
    assert done.summary["admin_deeds"] > 0
    drawn = tmp_path / "drawn.html"
    command = [sys.executable, "-m", "loadtest.report", str(recording), "-o", str(drawn)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)
    assert drawn.read_text("utf-8").count("<svg") >= 5


def test_the_web_ui_starts_a_run_and_shows_its_report(tiny_server: Served, tmp_path: Path) -> None:
    command = [*LOCUST, "--host", tiny_server.url, "--web-host", "127.0.0.1", "--web-port", "0"]
    command += ["--report", str(tmp_path / "report.html"), "--adapters", "1", "--loglevel", "INFO"]
    log = tmp_path / "locust.log"
    with free_port() as port:
        command[command.index("--web-port") + 1] = str(port)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as ui:
            until(lambda: answers(ui, "/"), log)
            assert ui.get("/load-report").status_code == 404
            form = {
                "user_count": "2",
                "spawn_rate": "10",
                "run_time": "2s",
                "host": tiny_server.url,
            }
            assert ui.post("/swarm", data=form).json()["success"], log.read_text()
            until(lambda: ui.get("/load-report").status_code == 200, log)
            assert "all objectives kept" in ui.get("/load-report").text
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_a_server_that_is_not_there_is_a_sentence_and_an_exit_code() -> None:
    with free_port() as port:
        url = f"http://127.0.0.1:{port}"
    done = run(url, "-t", "2s")
    assert done.exit_code == 3
    assert "can't be reached" in done.summary["failure"]


class FakeServer(BaseHTTPRequestHandler):
    """Answers as trunkline does, but all that arrives in a stall waits for the stall's end."""

    protocol_version = "HTTP/1.1"
    stall = (0.0, 0.0)  # seconds from the first request on
    first: float | None = None
    digest = "sha256:" + "1" * 64

    def do_GET(self) -> None:
        config = {"vocab_size": 9, "mask_token_id": 7, "pad_token_id": 8}
        self.send(
            {
                "/info": {
                    "version": "0", "dtype": "float32", "device": "cpu", "config": config,
                    "backbone": {"id": "fake", "digest": "", "heads": {"critic": False}},
                    "limits": {"block_size": 64},
                },
                "/adapters/a": {
                    "versions": [
                        {
                            "version": 1, "digest": FakeServer.digest,
                            "applied": {"critic": False, "classifier": False},
                        }
                    ]
                },
            }.get(self.path, {"data": [{"name": "a", "digest": FakeServer.digest}], "next": None})
        )  # fmt: skip

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/tokenize":
            self.send({"error": {"code": "untokenizable_text"}}, 422)
            return
        cls = type(self)
        cls.first = cls.first or time.monotonic()
        since = time.monotonic() - cls.first
        if cls.stall[0] <= since < cls.stall[1]:
            time.sleep(cls.stall[1] - since)
        question = json.loads(body)
        adapter = None
        if question["adapter"] != "base":
            adapter = {"name": "a", "version": 1, "digest": self.answered_digest}
        rows = [{"adapter": adapter, "embedding": [1.0]} for _ in question["inputs"]]
        self.send({"data": rows, "usage": {"total_tokens": 1}})

    answered_digest = digest

    def send(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


FAKE_FLAGS = ("--swaps", 0, "--mix", "encode=1", "--metrics-every", 0, "--report", "")


@contextmanager
def fake_server(**attributes: Any) -> Iterator[str]:
    handler = type("Handler", (FakeServer,), attributes | {"first": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def free_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        yield server.server_port


def slow(recording: Path) -> int:
    """Requests of half a second or more."""
    seconds = json.loads(recording.read_text("utf-8"))["recording"]["seconds"].values()
    counts = [item for s in seconds for item in s["latencies"].get("encode", {}).items()]
    return sum(count for bucket, count in counts if 0.01 * 1.01 ** int(bucket) >= 495)


@pytest.mark.alone
def test_the_open_loop_shows_a_stall_that_the_closed_loop_hides(tmp_path: Path) -> None:
    found = {}
    for loop, flags in (("closed", ("-u", 2)), ("open", ("--rate", 50))):
        recording = tmp_path / f"{loop}.json"
        with fake_server(stall=(1.0, 2.5)) as url:
            done = run(
                url, *flags, "-t", "4s", "--adapters", 0, "--arrivals", "constant",
                "--recording", recording, *FAKE_FLAGS,
            )  # fmt: skip
        assert done.summary["failed"] == 0, done.output
        found[loop] = slow(recording)
    # Two users wait through the stall; of 50 requests a second all those of its first second do
    assert 1 <= found["closed"] <= 4
    assert found["open"] >= 35


@pytest.mark.parametrize(
    ("digest", "code"), [(FakeServer.digest, 0), ("sha256:" + "2" * 64, 1)], ids=["right", "wrong"]
)
def test_an_answer_by_another_digest_is_found(digest: str, code: int) -> None:
    with fake_server(answered_digest=digest) as url:
        flags = ("-u", 2, "-t", "2s", "--names", "a", "--check-share", 0, *FAKE_FLAGS)
        done = run(url, *flags, "--error-rate", 1)
    assert done.exit_code == code, done.output
    assert (done.summary["wrong"] > 0) is bool(code)
    assert done.summary["requests"] > 0


def answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


def until(condition: Any, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
