"""One process's part in a load run: what it was told to do, and what it has seen.

The master (or the only process) prepares the server, makes the plan and sends it to the workers;
they send back what they record, and news of the moves that the admin makes.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import gevent
import httpx
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from loadtest import population
from loadtest.adapter_file import AdapterMaker
from loadtest.answers import Verdict
from loadtest.catalogue import Catalogue
from loadtest.conclusion import conclude
from loadtest.options import DEFAULT_SECONDS, DEFAULT_USERS, Settings, settings_of
from loadtest.outcome import Outcome
from loadtest.profile import Profile
from loadtest.questions import Questioner
from loadtest.recording import Mark, Recording
from loadtest.server_metrics import ServerMetrics
from loadtest.timeline import Judge, Timeline
from loadtest.workload import PASSAGE, Bursts, Lengths, Passage, Popularity

log = logging.getLogger("loadtest")
logging.getLogger("httpx").setLevel(logging.WARNING)  # it says every request

PREFIX = "load/a"
PLAN, MOVE, RECORDED = "trunkline-plan", "trunkline-move", "trunkline-recording"
NEWS_S = 3.0  # by then news of a move has reached every worker
LAST_NEWS_S = 0.5  # and what workers sent while they stopped has reached the master
SHARE_OF_BLOCK = 15 / 16  # a text cut at tokens may take a few more of them than it was cut for


@dataclass
class Session:
    environment: Environment
    settings: Settings = field(default_factory=Settings)
    profile: Profile = field(init=False)
    questioner: Questioner = field(init=False)
    catalogue: Catalogue = field(default_factory=Catalogue)
    timeline: Timeline = field(default_factory=Timeline)
    judge: Judge = field(init=False)
    recording: Recording = field(default_factory=Recording)
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    info: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    workers: int = 1
    outcome: Outcome | None = None
    failure: str | None = None  # why the load could not begin
    running: bool = False
    _users: Counter[str] = field(default_factory=Counter)
    _began: float = 0.0
    _began_wall: float = 0.0

    def connect(self) -> None:
        """Take part in the exchange of messages; called once, when the runner is there."""
        runner = self.environment.runner
        assert runner is not None
        if isinstance(runner, MasterRunner):
            runner.register_message(MOVE, lambda msg, **_: self._pass_on(msg.data))
            runner.register_message(RECORDED, lambda msg, **_: self._merge(msg.data))
        else:
            runner.register_message(PLAN, lambda msg, **_: self.start(msg.data))
        if isinstance(runner, WorkerRunner):
            runner.register_message(MOVE, lambda msg, **_: self._hear(msg.data))

    # The master, or the only process

    def prepare(self) -> None:
        """Bring the adapters onto the server and start the run everywhere.

        Raises LoadError or ValueError, with a sentence, where the load can't begin.
        """
        runner, options = self.environment.runner, self.environment.parsed_options
        assert runner is not None
        assert options is not None
        settings = settings_of(options)
        settings.weights()
        with population.open_client(self.url, settings.key) as client:
            self.info = population.ask(client, "GET", "/info")
            catalogue = self._populate(client, settings)
            plan = {
                "settings": settings.to_json(),
                "peak": settings.rate or options.num_users or DEFAULT_USERS,
                "seconds": options.run_time or DEFAULT_SECONDS,
                "workers": runner.worker_count if isinstance(runner, MasterRunner) else 1,
                "info": self.info,
                "catalogue": catalogue.to_json(),
                "current": population.current_digests(client, catalogue),
                "spans": population.passage_spans(client),
            }
        plan["began"] = time.time()
        if isinstance(runner, MasterRunner):
            self.start(plan)
        runner.send_message(PLAN, plan)

    def _populate(self, client: Any, settings: Settings) -> Catalogue:
        if settings.names:
            return population.existing(client, settings.names.split(","))
        maker = AdapterMaker(self.info["config"], self.info["backbone"]["digest"], settings.rank)
        return population.populate(
            client, maker, PREFIX, settings.adapters, settings.seed, log.info
        )

    @property
    def url(self) -> str:
        return (self.environment.host or "http://127.0.0.1:8000").rstrip("/")

    def conclude(self) -> None:
        """Compare the samples, clean up, write the report: once the users have stopped."""
        if not self.running:
            return
        self.running = False
        with population.open_client(self.url, self.settings.key) as client:
            self.outcome = conclude(
                client, self.settings, self.profile, self.recording, self.metrics, self.info
            )
            if not self.settings.names and not self.settings.keep:
                population.remove(client, self.catalogue)

    def _merge(self, data: dict[str, Any]) -> None:
        self.recording.merge(Recording.from_json(data["recording"]))
        for received, name, digest, sent in data["unjudged"]:
            self.judge.note(name, digest, sent, received)

    def _pass_on(self, move: dict[str, Any]) -> None:
        assert self.environment.runner is not None
        self.environment.runner.send_message(MOVE, move)
        self._apply(move)

    # Every process

    def start(self, plan: dict[str, Any]) -> None:
        """Begin with what the plan says; everything of an earlier run is forgotten."""
        self.settings = settings = Settings(**plan["settings"])
        self.profile = Profile(settings.shape, plan["peak"], plan["seconds"], settings.steps)
        self.workers, self.info = plan["workers"], plan["info"]
        self.catalogue = Catalogue.from_json(plan["catalogue"])
        self.timeline = Timeline(settings.clock_slack_ms / 1e3)
        for name, digest in plan["current"].items():
            self.timeline.start(name, digest)
        distributed = not isinstance(self.environment.runner, LocalRunner)
        self.judge = Judge(self.timeline, NEWS_S if distributed else 0.0)
        self.questioner = self._questioner(plan)
        self.weights = {
            kind: weight
            for kind, weight in settings.weights().items()
            if kind != "classify" or self.catalogue.names_of("classify")
        }
        self.recording, self.metrics, self.outcome = Recording(), ServerMetrics(), None
        self._users.clear()
        behind = max(0.0, time.time() - plan["began"])
        self._began_wall, self._began = time.time() - behind, time.perf_counter() - behind
        self.running = True
        gevent.spawn(self._judge_and_send)
        if not isinstance(self.environment.runner, WorkerRunner) and settings.metrics_every > 0:
            gevent.spawn(self._read_metrics)

    def _questioner(self, plan: dict[str, Any]) -> Questioner:
        settings, config = self.settings, plan["info"]["config"]
        high = int(min(512, plan["info"]["limits"]["block_size"] * SHARE_OF_BLOCK))
        spans = plan["spans"]
        ids = {config["mask_token_id"], config["pad_token_id"], config.get("cls_token_id")}
        return Questioner(
            self.catalogue,
            Popularity(
                max(1, len(self.catalogue.entries)), settings.zipf, settings.drift, settings.seed
            ),
            Lengths(settings.length_median, settings.length_sigma, 4, high),
            Bursts(
                settings.burst_every, settings.burst_seconds, settings.burst_factor, settings.seed
            ),
            None if spans is None else Passage(PASSAGE, [(a, b) for a, b in spans]),
            [i for i in range(config["vocab_size"]) if i not in ids],
            settings.base_share,
            settings.check_share,
            settings.texts,
            settings.texts_share,
        )

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._began

    def wall(self, at: float) -> float:
        """The wall clock `at` seconds after the beginning."""
        return self._began_wall + at

    def rng(self, kind: str) -> random.Random:
        """A stream of its own for each user: the same for the n-th of a kind in every run."""
        self._users[kind] += 1
        worker = getattr(self.environment.runner, "worker_index", 0)
        return random.Random(f"{self.settings.seed} {worker} {kind} {self._users[kind]}")

    def note(self, verdict: Verdict, sent: float, received: float) -> None:
        """sent, received: of the wall clock."""
        for name, digest in verdict.served:
            self.judge.note(name, digest, sent, received)
        self.recording.judged += len(verdict.served)
        if verdict.sample is not None:
            self.recording.samples.append(asdict(verdict.sample))

    def move(self, step: str, name: str, digest: str, number: int | None = None) -> None:
        """News of the admin's: step is `asked` or `answered`; number: a version that is new."""
        news = {"step": step, "name": name, "digest": digest, "number": number, "at": time.time()}
        self._apply(news)
        if isinstance(self.environment.runner, WorkerRunner):
            news["by"] = self.environment.runner.client_id
            self.environment.runner.send_message(MOVE, news)

    def mark(self, mark: Mark) -> None:
        self.recording.marks.append(mark)

    def _hear(self, news: dict[str, Any]) -> None:
        """News that the master passed on, to the admin's own worker too."""
        assert isinstance(self.environment.runner, WorkerRunner)
        if news["by"] != self.environment.runner.client_id:
            self._apply(news)

    def _apply(self, news: dict[str, Any]) -> None:
        name, digest = news["name"], news["digest"]
        if news["number"] is not None:
            self.catalogue.add_version(name, news["number"], digest)
        change = self.timeline.asked if news["step"] == "asked" else self.timeline.answered
        change(name, digest, news["at"])

    def stop(self) -> None:
        """The users of this process have stopped.

        A worker reads no news while it stops, so its last answers are judged by the master.
        """
        if isinstance(self.environment.runner, WorkerRunner):
            self.running = False
            self._send(self.judge.hand_over())
            return
        gevent.sleep(LAST_NEWS_S)
        self.settle(float("inf"))

    def settle(self, now: float) -> None:
        for fault in self.judge.settle(now):
            self.recording.faults["wrong: a digest that the name did not mean then"] += 1
            log.error("%s", fault)

    def _send(self, unjudged: Sequence[tuple[float, str, str, float]] = ()) -> None:
        assert self.environment.runner is not None
        recording, self.recording = self.recording, Recording()
        self.environment.runner.send_message(
            RECORDED, {"recording": recording.to_json(), "unjudged": list(unjudged)}
        )

    def _judge_and_send(self) -> None:
        recording_of_run = self.judge
        while self.running and self.judge is recording_of_run:
            gevent.sleep(1.0)
            self.settle(time.time())
            if isinstance(self.environment.runner, WorkerRunner) and self.running:
                self._send()

    def _read_metrics(self) -> None:
        metrics = self.metrics
        with population.open_client(self.url, self.settings.key) as client:
            while self.running and self.metrics is metrics:
                try:
                    metrics.add(self.elapsed(), client.get("/metrics").raise_for_status().text)
                except (httpx.HTTPError, ValueError) as error:
                    log.warning("the server's metrics could not be read: %s", error)
                gevent.sleep(self.settings.metrics_every)
