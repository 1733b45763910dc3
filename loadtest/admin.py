"""The admin: pushes, promotes, rolls back, loads and unloads adapters while the load goes on."""

import hashlib
import time
from collections.abc import Callable
from typing import Any

import orjson
from locust import FastHttpUser, task

from loadtest.adapter_file import AdapterMaker
from loadtest.answers import error_code
from loadtest.population import OCTETS, seed_of
from loadtest.recording import Mark
from loadtest.session import PREFIX, Session

MAX_VERSIONS = 6  # of a name that is pushed to; older ones are what is promoted then
JSON = {"content-type": "application/json"}
FIRST_NEW = 500  # version number from which seeds of pushed files count: none is met twice


class Refused(Exception):
    """An answer that is no success, by its status and code."""


class Admin(FastHttpUser):
    """One for the whole run: it alone moves names, so it knows what each may mean when."""

    fixed_count = 1

    def __init__(self, environment: Any) -> None:
        self.session: Session = environment.trunkline
        super().__init__(environment)

    def on_start(self) -> None:
        session = self.session
        self.rng, self.pushed = session.rng("admin"), 0
        key = session.settings.key
        self.key = {"authorization": f"Bearer {key}"} if key else {}
        info = session.info
        self.maker = AdapterMaker(info["config"], info["backbone"]["digest"], session.settings.rank)

    def wait_time(self) -> float:
        return self.rng.expovariate(self.session.settings.swaps / 60)

    @task
    def deed(self) -> None:
        """One deed on an adapter as popular as those that are asked for."""
        session = self.session
        names = session.catalogue.names
        drawn = session.questioner.popularity.draw(self.rng, session.elapsed())
        name = names[drawn % len(names)]
        deeds: list[Callable[[str], int | None]] = [
            self.push,
            self.promote,
            self.roll_back,
            self.load,
            self.unload,
        ]
        (do,) = self.rng.choices(deeds, (3, 3, 2, 1, 1))
        if do == self.push and len(session.catalogue.versions(name)) >= MAX_VERSIONS:
            do = self.promote
        began, at = time.perf_counter(), session.elapsed()
        version, fault = None, None
        try:
            version = do(name)
        except Refused as refused:
            fault = f"admin {refused}"
            session.recording.faults[fault] += 1
        ms = (time.perf_counter() - began) * 1e3
        session.mark(Mark(at, do.__name__.replace("_", " "), name, version, ms, fault))

    def push(self, name: str) -> int:
        """A new version, current at once."""
        self.pushed += 1
        index = int(name.removeprefix(PREFIX))
        file = self.maker.file(
            seed_of(self.session.settings.seed, index, FIRST_NEW + self.pushed % FIRST_NEW)
        )
        digest = _digest(file)
        self.session.move("asked", name, digest)
        answer = self._ask("PUT", f"/adapters/{name}", file, OCTETS, "push")
        assert answer["digest"] == digest, f"pushed {digest}, answered {answer['digest']}"
        self.session.move("answered", name, digest, answer["version"])
        return int(answer["version"])

    def promote(self, name: str) -> int:
        number, digest = self.rng.choice(self.session.catalogue.versions(name))
        return self._point(name, number, digest, {}, "promote")

    def roll_back(self, name: str) -> int | None:
        """To the version before, unless there is none."""
        current = self._ask("GET", f"/adapters/{name}", None, {}, "look")["aliases"]["current"]
        if current["previous"] is None:
            return None
        digest = self.session.catalogue.entries[name].versions[current["previous"]]
        condition = {"if-match": f'"{current["generation"]}"'}
        return self._point(name, current["previous"], digest, condition, "roll back")

    def load(self, name: str) -> None:
        self._ask("POST", f"/adapters/{name}/load", None, {}, "load")

    def unload(self, name: str) -> None:
        self._ask("POST", f"/adapters/{name}/unload", None, {}, "unload")

    def _point(
        self, name: str, number: int, digest: str, headers: dict[str, str], what: str
    ) -> int:
        self.session.move("asked", name, digest)
        path = f"/adapters/{name}/aliases/current"
        self._ask("PUT", path, orjson.dumps({"version": number}), JSON | headers, what)
        self.session.move("answered", name, digest)
        return number

    def _ask(
        self, method: str, path: str, data: bytes | None, headers: dict[str, str], what: str
    ) -> dict[str, Any]:
        """Raises Refused for anything but success."""
        with self.client.request(
            method,
            path,
            name=f"admin: {what}",
            data=data,  # type: ignore[arg-type]  # bytes are sent as they are
            headers=self.key | headers,
            catch_response=True,
        ) as response:
            status, content = response.status_code or 0, response.content or b""
            if not 200 <= status < 300:
                response.failure(error_code(status, content))
                raise Refused(f"{what}: {error_code(status, content)}")
            response.success()
        answer: dict[str, Any] = orjson.loads(content)
        return answer


def _digest(file: bytes) -> str:
    return f"sha256:{hashlib.sha256(file).hexdigest()}"
