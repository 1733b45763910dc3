"""A load run against a server of its own: `python -m loadtest`, 12 users, two minutes.

Flags that are not its own go to Locust (`--host URL` loads a server that is there already). With
--both-loops the run is made twice, first as a closed loop in steps, then as an open loop in steps
up to a little more than what the closed loop got through, and a page sets the two side by side.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from loadtest.environment import own_packages
from loadtest.options import flags_text
from loadtest.outcome import Outcome
from loadtest.pictures import plateau_points
from loadtest.report import loops_page

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
STARTS_WITHIN_S = 120
# Locust's own is one user for ever. A user asks one kind of question: one user, one kind.
USUAL = ("--users", "12", "--run-time", "120s")
OVER_THE_KNEE = 1.15


@contextmanager
def own_server(backbone: str | None, log: Path) -> Iterator[str]:
    """A server on a free port, with its data in a temporary folder; yields its address."""
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0"]
    command += ["--log-level", "warning"] + ([backbone] if backbone else [])
    with tempfile.TemporaryDirectory() as data, log.open("wb") as out:
        environment = {"TRUNKLINE_DATA_DIR": data} | dict(os.environ) | own_packages()
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            yield _address(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Waits until the server is ready. Raises SystemExit with its log where it never is."""
    deadline = time.monotonic() + STARTS_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        words = log.read_text("utf-8", "replace").split()
        url = next((word for word in words if word.startswith("http://127.0.0.1:")), None)
        if url and _is_ready(url):
            return url
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text('utf-8', 'replace')}")


def _is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def run_locust(url: str, flags: Sequence[str]) -> tuple[int, dict[str, object]]:
    """Exit code and summary; what Locust prints is passed on."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url]
    command += ["--headless", "--only-summary", *USUAL, *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=dict(os.environ) | own_packages()
    ) as process:
        assert process.stdout is not None
        line = ""
        for line in process.stdout:
            print(line, end="", flush=True)
    return process.returncode, json.loads(line)


def both_loops(url: str, flags: Sequence[str], report: Path) -> int:
    """Closed loop, then open loop to just beyond its throughput; the worse exit code."""
    runs, code, rate = [], 0, 0.0
    for loop in ("closed", "open"):
        recording = report.with_name(f"{report.stem}-{loop}.json")
        page = report.with_name(f"{report.stem}-{loop}.html")
        files = ["--recording", str(recording), "--report", str(page)]
        goal = ["--rate", f"{rate:.1f}"] if loop == "open" else []
        exit_code, _ = run_locust(url, [*flags, "--shape", "steps", *files, *goal])
        code = max(code, exit_code)
        runs.append(Outcome.from_json(json.loads(recording.read_text("utf-8"))))
        rate = OVER_THE_KNEE * max(p["requests_per_s"] for p in plateau_points(runs[-1]))
    report.write_text(loops_page(*runs), "utf-8")
    print(f"report: {report}", file=sys.stderr)
    return code


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest",
        description=__doc__,
        epilog=flags_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", help="the server; without it one is started")
    parser.add_argument("--backbone", help="folder of the trunk that is served; default: the demo")
    parser.add_argument("--both-loops", action="store_true", help="closed, then open")
    parser.add_argument("--report", type=Path, default=Path("load-report.html"), help="page")
    options, flags = parser.parse_known_args()

    def load(url: str) -> int:
        if options.both_loops:
            return both_loops(url, flags, options.report)
        return run_locust(url, [*flags, "--report", str(options.report)])[0]

    if options.host:
        raise SystemExit(load(options.host))
    log = options.report.with_suffix(".server.log")
    with own_server(options.backbone, log) as url:
        code = load(url)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
