"""Servers in processes of their own: trunkline's, and the bare route beside it."""

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.environment import own_packages

STARTS_WITHIN_S = 120.0
LOOKS_EVERY_S = 0.005


class DidNotStart(Exception):
    """With the end of its log."""


@dataclass(frozen=True)
class Running:
    host: str
    port: int
    pid: int
    start_s: float  # from its beginning to its first answer on /ready


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """This thread, and the processes that it begins meanwhile, run there alone; none: anywhere."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def trunkline(log: Path, *arguments: str | Path, cores: Collection[int] = ()) -> Iterator[Running]:
    """`trunkline serve ARGUMENTS` on a free port, ready to answer."""
    module = ["server.cli", "serve", "--port", "0", "--log-level", "warning", *arguments]
    with running(log, module, cores) as it:
        yield it


@contextmanager
def running(
    log: Path, module: Sequence[str | Path], cores: Collection[int] = ()
) -> Iterator[Running]:
    """`python -m MODULE`, which prints its address. Raises DidNotStart."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRUNKLINE_")}
    environment |= own_packages()
    with log.open("wb") as out, on_cores(cores):
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, module)], stdout=out, stderr=out, env=environment
        )
    try:
        yield _wait(process, log, began)
    finally:
        process.kill()  # nothing of it is needed any more
        process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path, began: float) -> Running:
    while process.poll() is None and time.monotonic() < began + STARTS_WITHIN_S:
        words = log.read_text("utf-8", "replace").split()
        url = next((word for word in words if word.startswith("http://127.0.0.1:")), None)
        if url is not None:
            host, port = urlsplit(url).hostname, urlsplit(url).port
            assert host is not None
            assert port is not None
            if _is_ready(host, port):
                return Running(host, port, process.pid, time.monotonic() - began)
        time.sleep(LOOKS_EVERY_S)
    raise DidNotStart(log.read_text("utf-8", "replace")[-2000:])


def _is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def cpu_seconds(pid: int) -> float:
    """Of a process, all its threads, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
