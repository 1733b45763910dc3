"""Real traffic for Locust: `locust -f loadtest/locustfile.py --host URL`.

Headless or with the web UI, in one process or distributed (--master, --worker, --processes).
docs/loadtest.md tells how to aim it and how to read the report.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by its path, as Locust does

from flask import Response
from locust import LoadTestShape, User, events
from locust.runners import WorkerRunner

from loadtest.admin import Admin
from loadtest.options import add_arguments, settings_of
from loadtest.population import LoadError
from loadtest.session import Session, log
from loadtest.users import CLOSED, Classify, Critic, Encode, FanOut, OpenAI, OpenLoop

__all__ = ["Admin", "Classify", "Critic", "Encode", "FanOut", "OpenAI", "OpenLoop", "ProfileShape"]

STOP_TIMEOUT_S = 15.0  # for requests under way at the end
SPAWN_RATE = 100.0
COULD_NOT_BEGIN = 3

events.init_command_line_parser.add_listener(add_arguments)


class ProfileShape(LoadTestShape):
    """Users over time, as --shape says; in an open loop one user a worker, whose rate changes."""

    use_common_options = True

    def tick(self) -> tuple[int, float, list[type[User]]] | None:
        session: Session = self.runner.environment.trunkline  # type: ignore[union-attr]
        if not session.running:
            try:
                session.prepare()
            except (LoadError, ValueError) as error:
                session.failure = str(error)
                log.error("%s", error)
                return None
        level = session.profile.level(session.elapsed())
        if level is None:
            return None
        admins = 1 if session.settings.swaps and not session.settings.names else 0
        with_admin: list[type[User]] = [Admin] if admins else []
        if session.settings.rate:
            return session.workers + admins, SPAWN_RATE, [OpenLoop, *with_admin]
        classes = [user for user in CLOSED if session.weights.get(user.kind, 0) > 0]
        for user in classes:
            user.weight = session.weights[user.kind]
        return max(1, round(level)) + admins, SPAWN_RATE, [*classes, *with_admin]


@events.init.add_listener
def take_part(environment: Any, **_: Any) -> None:
    environment.trunkline = session = Session(environment)
    environment.stop_timeout = max(environment.stop_timeout or 0.0, STOP_TIMEOUT_S)
    session.connect()
    if environment.web_ui:

        @environment.web_ui.app.route("/load-report")
        def load_report() -> Response:
            """The report of the last finished run."""
            path = settings_of(environment.parsed_options).report
            if session.outcome is None or not path:
                return Response("no run has finished yet", 404)
            return Response(Path(path).read_text("utf-8"), mimetype="text/html")


@events.test_stop.add_listener
def test_stopped(environment: Any, **_: Any) -> None:
    session: Session = environment.trunkline
    if not session.running:
        return
    session.stop()
    if not isinstance(environment.runner, WorkerRunner):
        session.conclude()


@events.quitting.add_listener
def decide(environment: Any, **_: Any) -> None:
    session: Session = environment.trunkline
    if session.failure is not None:
        environment.process_exit_code = COULD_NOT_BEGIN
    elif session.outcome is not None:
        environment.process_exit_code = session.outcome.exit_code
    if not isinstance(environment.runner, WorkerRunner):
        events.quit.add_listener(lambda exit_code: _say_last(session, exit_code))


def _say_last(session: Session, exit_code: int) -> None:
    """One JSON line, behind everything that Locust prints."""
    if session.outcome is not None:
        for breach in session.outcome.breaches:
            print(f"missed: {breach}", file=sys.stderr)
        line = session.outcome.summary
    else:
        line = {"failure": session.failure, "exit_code": exit_code}
    print(json.dumps(line), flush=True)
