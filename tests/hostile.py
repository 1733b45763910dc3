"""A hostile client: its own bytes over raw sockets, again and again; a probe of /health beside it.

`hostile.py HOST PORT FILE KIND [REQUEST]` is the probe: a process of its own, so that it measures
the server and not this client's threads. Of the standard library alone, so that it starts at once.
"""

import json
import math
import os
import select
import socket
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException, HTTPResponse
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

ATTACKERS = 2  # connections that send a row at the same time
MAX_ERROR_BYTES = 4096
MUST_WAIT = (429, 503)  # these tell how long: Retry-After
PROBE_S = 0.005  # from one GET /health to the next
DRIBBLE_S = 0.2  # from one byte of a slow client to its next
PATIENCE_S = 180.0  # beyond it there is no answer
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"

Address = tuple[str, int]
Parts = tuple[bytes, ...]  # of one request, sent one after the other


class Outcome(NamedTuple):
    """What a request got. Status 0: no answer, and `code` says why."""

    status: int
    code: str | None = None
    reason: str | None = None  # of an adapter file

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part)


LEFT = Outcome(0, "left unread")


@dataclass(frozen=True)
class Row:
    """One bad input: the requests that are it, sent in turn, and what each of them gets."""

    name: str
    expected: Outcome
    requests: tuple[Parts, ...]
    or_else: Outcome | None = None  # what it may get too
    secrets: tuple[str, ...] = ()  # words of it that no refusal may hold
    whole: bool = True  # False: the server waits for more, so its connection is of no more use

    @property
    def leaves(self) -> bool:
        """Whether the client goes as soon as it has sent it."""
        return self.expected == LEFT


def row(name: str, expected: Outcome, *requests: Parts, **options: Any) -> Row:
    return Row(name, expected, requests, **options)


class Answer(NamedTuple):
    status: int
    head: str
    body: bytes


@dataclass
class Tally:
    """What came of many requests: how often each outcome, and what was wrong with them."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, outcome: Outcome, answer: Answer | None = None) -> None:
        self.outcomes[outcome] += 1
        if outcome not in (row.expected, row.or_else):
            self.faults[f"{row.name}: {outcome}, not {row.expected}"] += 1
        if answer is not None and answer.status >= 400:
            self.faults.update(f"{row.name}: {fault}" for fault in _faults(answer, row.secrets))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.outcomes + other.outcomes, self.faults + other.faults)


def _faults(answer: Answer, secrets: Sequence[str]) -> Iterator[str]:
    """What no refusal may be, whatever its code."""
    if len(answer.body) > MAX_ERROR_BYTES:
        yield f"a refusal of {len(answer.body)} bytes"
    if answer.status in MUST_WAIT and "retry-after:" not in answer.head.lower():
        yield f"{answer.status} without Retry-After"
    text = answer.head + answer.body.decode("utf-8", "replace")
    for secret in secrets:
        if secret in text:
            yield f"the answer holds what was sent: {secret[:40]!a}"


def outcome_of(answer: Answer) -> Outcome:
    if answer.status < 400:
        return Outcome(answer.status)
    try:
        error = json.loads(answer.body)["error"]
        return Outcome(answer.status, error["code"], error.get("details", {}).get("reason"))
    except (ValueError, LookupError, TypeError):
        return Outcome(answer.status, "a body of another shape")


class Attacker:
    """One connection, kept for the next request as long as the server keeps it."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.connection: socket.socket | None = None

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def ask(self, parts: Parts) -> Answer:
        """Raises OSError or HTTPException where a new connection brings no answer."""
        if self.connection is not None:
            try:
                return self._exchange(parts)
            except (OSError, HTTPException):
                self.close()  # the server had closed it since: no fault
        return self._exchange(parts)

    def leave(self, parts: Parts) -> None:
        self.close()
        with suppress(OSError):  # refused before all was sent
            self._send(parts)
        self.close()

    def _send(self, parts: Parts) -> socket.socket:
        if self.connection is None:
            self.connection = socket.create_connection(self.address, timeout=PATIENCE_S)
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            self.connection.sendall(part)
        return self.connection

    def _exchange(self, parts: Parts) -> Answer:
        cut_off = False
        try:
            self._send(parts)
        except OSError:
            if self.connection is None:
                raise
            cut_off = True  # refused before all was sent: the answer is there
        assert self.connection is not None
        with closing(HTTPResponse(self.connection)) as response:
            response.begin()
            answer = Answer(response.status, str(response.headers), response.read())
        if cut_off or response.will_close:
            self.close()
        return answer


def assault(address: Address, row: Row, seconds: float) -> Tally:
    """The row, sent by all attackers at once for so long, and each request of it once at least."""
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(ATTACKERS) as threads:
        attack = partial(_attack, address, row, until)
        return sum(threads.map(attack, range(ATTACKERS)), Tally())


def _attack(address: Address, row: Row, until: float, place: int) -> Tally:
    """One attacker; the next has the next request, so that together they soon have sent all."""
    tally = Tally()
    share = math.ceil(len(row.requests) / ATTACKERS)
    with closing(Attacker(address)) as attacker:
        for sent, parts in enumerate(islice(cycle(row.requests), place * share, None)):
            if sent >= share and time.monotonic() >= until:
                break
            _attack_once(attacker, row, parts, tally)
    return tally


def _attack_once(attacker: Attacker, row: Row, parts: Parts, tally: Tally) -> None:
    if row.leaves:
        attacker.leave(parts)
        tally.add(row, LEFT)
        return
    try:
        answer = attacker.ask(parts)
        tally.add(row, outcome_of(answer), answer)
    except (OSError, HTTPException) as error:
        attacker.close()
        tally.add(row, Outcome(0, type(error).__name__))
    if not row.whole:
        attacker.close()


def await_health(address: Address) -> None:
    """Until all that was sent before is accepted: a server accepts in order of arrival.

    Raises OSError where that takes longer than PATIENCE_S.
    """
    with closing(Attacker(address)) as client:
        client.ask((HEALTH,))


def dribble(address: Address, row: Row, clients: int) -> Tally:
    """Slow clients: each begins the row's request, and adds a byte now and then until answered.

    Raises TimeoutError where one is neither answered nor closed for PATIENCE_S.
    """
    tally, until = Tally(), time.monotonic() + PATIENCE_S
    waiting = [socket.create_connection(address, timeout=PATIENCE_S) for _ in range(clients)]
    for connection in waiting:
        connection.sendall(b"".join(row.requests[0]))
    while waiting:
        if time.monotonic() > until:
            raise TimeoutError(f"{row.name}: {len(waiting)} connections are still open")
        for connection in select.select(waiting, [], [], DRIBBLE_S)[0]:
            waiting.remove(connection)
            with connection:
                tally.add(row, *_last_words(connection))
        for connection in waiting:
            with suppress(OSError):  # closed meanwhile, which the next look shows
                connection.sendall(b"x")
        time.sleep(DRIBBLE_S)
    return tally


def _last_words(connection: socket.socket) -> tuple[Outcome, Answer | None]:
    """All that comes until the server closes."""
    received = b""
    with suppress(ConnectionError):
        for part in iter(partial(connection.recv, 65536), b""):
            received += part
    if not received:
        return Outcome(0, "closed without an answer"), None
    head, _, body = received.partition(b"\r\n\r\n")
    answer = Answer(int(head.split()[1]), head.decode("latin-1"), body)
    return outcome_of(answer), answer


# The probe.


class Sample(NamedTuple):
    """One GET /health: when it was due, by the clock that all processes share, and what it got.

    The time is from when it was due. Those that fall due while one is under way are not sent: they
    are taken to have waited for its answer, so that a stall counts for as long as it is.
    """

    due: float
    status: int  # 0: none
    ms: float


def measure(address: Address, file: Path, kind: str, request: Path | None = None) -> None:
    """A line a sample, for ever; `new` for each on a connection of its own, as balancers do it.

    What is sent is GET /health, or what the file `request` has, ten times less often.
    """
    prober = Attacker(address)
    due = time.monotonic()
    sent = HEALTH if request is None else request.read_bytes()
    period = PROBE_S if request is None else 10 * PROBE_S
    with file.open("w", buffering=1) as lines:
        while True:
            time.sleep(max(0.0, due - time.monotonic()))
            status, now = _status(prober, sent), time.monotonic()
            if kind == "new":
                prober.close()
            while due < now:
                lines.write(f"{due} {status} {(now - due) * 1e3}\n")
                due += period


def _status(prober: Attacker, sent: bytes) -> int:
    try:
        return prober.ask((sent,)).status
    except (OSError, HTTPException):
        prober.close()
        return 0


class Probe:
    """What the probe's process has written so far."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def samples(self) -> list[Sample]:
        whole = self.file.read_text().rpartition("\n")[0] if self.file.exists() else ""
        fields = (line.split() for line in whole.splitlines())
        return [Sample(float(due), int(status), float(ms)) for due, status, ms in fields]


@contextmanager
def probing(
    address: Address, folder: Path, kind: str, request: bytes | None = None
) -> Iterator[Probe]:
    """A probe on a `kept` connection, or on `new` ones; of /health, or of another request."""
    file = folder / f"probe-{kind}"
    command = [sys.executable, __file__, address[0], str(address[1]), str(file), kind]
    if request is not None:
        (folder / f"request-{kind}").write_bytes(request)
        command.append(str(folder / f"request-{kind}"))
    with subprocess.Popen(command) as process:
        try:
            yield Probe(file)
        finally:
            process.kill()


# The table.


class Line(NamedTuple):
    """What came of a row, and from when to when it was sent."""

    name: str
    tally: Tally
    began: float
    ended: float


def table(lines: Sequence[Line], kept: Sequence[Sample], new: Sequence[Sample]) -> str:
    """Markdown: what each row got, and how long GET /health took while it was sent.

    `kept` and `new` are of the two kinds of probes.
    """
    cores, load = os.cpu_count(), os.getloadavg()[0]
    head = "row | status and code | times sent | /health p50 ms | p99 ms | p99 ms, new connection"
    return "\n".join(
        [
            f"{cores} cores, load {load:.1f} at the end; {ATTACKERS} clients send each row.",
            "",
            f"| {head} |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
            *(_table_row(line, kept, new) for line in lines),
            "",
        ]
    )


def _table_row(line: Line, kept: Sequence[Sample], new: Sequence[Sample]) -> str:
    name = line.name.encode("unicode_escape").decode()[:50]
    outcomes = ", ".join(map(str, line.tally.outcomes))
    sent = f"{line.tally.outcomes.total():,}"
    spans = (line.began, line.ended)
    times = (
        quantile(kept, 0.5, *spans),
        quantile(kept, 0.99, *spans),
        quantile(new, 0.99, *spans),
    )
    return f"| {' | '.join((name, outcomes, sent, *times))} |"


def quantile(samples: Sequence[Sample], share: float, began: float, ended: float) -> str:
    """Of the samples that fell due meanwhile, in milliseconds."""
    first, last = (bisect_left(samples, at, key=_due) for at in (began, ended))
    times = sorted(sample.ms for sample in samples[first:last])
    return f"{times[int(share * len(times))]:.1f}" if times else "-"


def _due(sample: Sample) -> float:
    return sample.due


if __name__ == "__main__":
    asked = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    measure((sys.argv[1], int(sys.argv[2])), Path(sys.argv[3]), sys.argv[4], asked)
