"""Users: of a closed loop, one class a kind of request; of an open loop, one for all kinds."""

from typing import Any

import gevent
from gevent.pool import Pool
from locust import FastHttpUser, constant, task

from loadtest.answers import check
from loadtest.questions import Question
from loadtest.session import Session

CONCURRENCY = 2048  # requests of one process under way
JSON = {"content-type": "application/json"}
IDLE_RATE = 2.0  # arrivals a second where the profile says less: it is looked at again then
LAST_S = 0.2


class TrunklineUser(FastHttpUser):
    abstract = True

    def __init__(self, environment: Any) -> None:
        self.session: Session = environment.trunkline
        self.network_timeout = self.connection_timeout = self.session.settings.request_timeout
        super().__init__(environment)
        key = self.session.settings.key
        self.headers = JSON | ({"authorization": f"Bearer {key}"} if key else {})

    def send(self, question: Question, meant: float) -> None:
        """One request, counted from when it was meant to be sent, in seconds of the run."""
        session = self.session
        session.recording.due(meant)
        sent = session.elapsed()
        with self.client.post(
            question.path,
            data=question.body.decode(),
            headers=self.headers,
            name=question.kind,
            catch_response=True,
        ) as response:
            received = session.elapsed()
            verdict = check(question, response.status_code or 0, response.content or b"")
            ms = (received - meant) * 1e3
            response.request_meta["response_time"] = ms
            if verdict.fault is None:
                response.success()
            else:
                response.failure(verdict.fault)
        session.note(verdict, session.wall(sent), session.wall(received))
        session.recording.answered(
            question.kind,
            meant,
            ms,
            (sent - meant) * 1e3,
            names=[reference.name for reference in question.references],
            tokens=verdict.tokens,
            fault=verdict.fault,
        )


class ClosedLoopUser(TrunklineUser):
    """Waits for each answer, and for its think time, before it asks again."""

    abstract = True
    kind = ""

    def on_start(self) -> None:
        self.rng = self.session.rng(self.kind)

    def wait_time(self) -> float:
        think_s = self.session.settings.think_ms / 1e3
        factor = self.session.questioner.bursts.factor_at(self.session.elapsed())
        return self.rng.expovariate(factor / think_s) if think_s > 0 else 0.0

    @task
    def ask(self) -> None:
        at = self.session.elapsed()
        self.send(self.session.questioner.draw(self.kind, self.rng, at), self.session.elapsed())


class Encode(ClosedLoopUser):
    kind = "encode"


class Critic(ClosedLoopUser):
    kind = "critic"


class Classify(ClosedLoopUser):
    kind = "classify"


class FanOut(ClosedLoopUser):
    kind = "fan-out"


class OpenAI(ClosedLoopUser):
    kind = "openai"


CLOSED: tuple[type[ClosedLoopUser], ...] = (Encode, Critic, Classify, FanOut, OpenAI)


class OpenLoop(TrunklineUser):
    """Sends when a request is due, whether the answers before it are there or not."""

    concurrency = CONCURRENCY
    wait_time = constant(0)

    def on_start(self) -> None:
        self.rng = self.session.rng("open loop")
        self.pool = Pool(CONCURRENCY)
        self.next_at = self.session.elapsed()

    def on_stop(self) -> None:
        self.pool.join(self.session.settings.request_timeout)

    @task
    def arrive(self) -> None:
        session = self.session
        if session.profile.level(self.next_at) is None:  # over; Locust will stop this user soon
            gevent.sleep(LAST_S)
            return
        rate = self._rate(self.next_at)
        if session.settings.arrivals == "poisson":
            self.next_at += self.rng.expovariate(rate)
        else:
            self.next_at += 1 / rate
        gevent.sleep(max(0.0, self.next_at - session.elapsed()))
        (kind,) = self.rng.choices(list(session.weights), list(session.weights.values()))
        question = session.questioner.draw(kind, self.rng, self.next_at)
        self.pool.spawn(self.send, question, self.next_at)

    def _rate(self, at: float) -> float:
        """Requests a second that this process is to send."""
        level = self.session.profile.level(at) or 0.0
        factor = self.session.questioner.bursts.factor_at(at)
        return max(IDLE_RATE, level * factor / self.session.workers)
