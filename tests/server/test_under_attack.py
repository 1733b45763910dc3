"""BAD_INPUTS: every row that a server can be sent, over raw sockets, again and again, by several
clients at once. Each gets its code, /health answers meanwhile, and nothing is left of any of it.

ATTACK_S is for how many seconds each row is sent; ATTACK_REPORT names a file for the table, which
is printed too. Disks that fail, kills and races have tests of their own.
"""

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from adapter_client import OCTETS, Adapters, wait_until
from bad_files import HEADER_FAULTS, WIDTH, A, B, file_of, set_bytes, set_faults
from conftest import TINY, Serve, random_adapter
from hostile import (
    LEFT,
    Address,
    Line,
    Outcome,
    Parts,
    Probe,
    Row,
    Tally,
    assault,
    await_health,
    dribble,
    probing,
    row,
    table,
)

from server.keys import Quota, new_key
from tests.server import test_adapter_admin as admin
from tests.server import test_adapter_names as names
from tests.server import test_bad_bodies as bodies
from tests.server import test_heads as heads

ATTACK_S = float(os.environ.get("ATTACK_S", "0.0"))
SLOW_CLIENTS = 30  # of each kind: one key may have 32 uploads under way
CAP = 8 << 20  # of a file: what a busy machine too receives in time
LIMITS = {
    "--max-adapter-bytes": CAP,
    "--storage-quota": 128 << 10,  # holds what is served here, and not one of rank 64 beside it
    "--max-request-tokens": 100_000,
    "--max-queue-tokens": 100_000,
    "--receive-timeout-s": 5,
    "--drain-window-s": 600,
}
KEYS: dict[str, dict[str, Any]] = {
    "root": {"scopes": {"infer", "admin", "metrics"}},
    "admin": {"scopes": {"admin"}},
    "infer": {"scopes": {"infer"}},
    "other": {"scopes": {"infer", "admin"}, "adapters": ("other/*",)},
    "spent": {"scopes": {"infer"}, "requests": Quota.parse("1/h")},
}
LONG = [[1] * 64] * 1500  # 96,000 tokens: one such request fills the queue
ENCODE = {"adapter": "plain", "inputs": "to be"}

INVALID = Outcome(422, "validation_error")
TOO_LARGE = Outcome(413, "body_too_large")
WRONG_TYPE = Outcome(415, "unsupported_media_type")
OVERLOADED = Outcome(503, "overloaded")
UNAUTHORIZED = Outcome(401, "unauthorized")
FORBIDDEN = Outcome(403, "forbidden")
CONFLICT = Outcome(412, "version_conflict")
MALFORMED_HEAD = Outcome(400, "malformed_request")
NO_ADAPTER, NO_VERSION = Outcome(404, "adapter_not_found"), Outcome(404, "version_not_found")
LATE = Outcome(408, "receive_timeout")


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@dataclass(frozen=True)
class Target:
    """The server under attack, the keys to it, and what came of each row."""

    adapters: Adapters
    keys: Mapping[str, str]
    address: Address
    kept: Probe
    new: Probe
    lines: list[Line] = field(default_factory=list)

    def head(
        self, method: str, path: str, headers: Mapping[str, object], key: str | None = "root"
    ) -> bytes:
        fields = {"host": "x", **(bearer(self.keys[key]) if key else {}), **headers}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {v}" for name, v in fields.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = bodies.JSON,
        key: str | None = "root",
    ) -> Parts:
        return self.head(method, path, {**headers, "content-length": len(body)}, key), body

    def post(self, path: str, value: object, key: str | None = "root") -> Parts:
        return self.request("POST", path, json.dumps(value).encode(), key=key)

    def put(
        self,
        file: bytes,
        path: str = "plain",
        headers: Mapping[str, str] | None = None,
        key: str | None = "root",
    ) -> Parts:
        return self.request("PUT", f"/adapters/{path}", file, OCTETS | dict(headers or {}), key)

    def rest(self) -> None:
        """A while of peace: what /health takes without an attack."""
        began = time.monotonic()
        time.sleep(max(0.5, ATTACK_S))
        self.lines.append(Line("no attack", Tally(), began, time.monotonic()))

    def attack(self, rows: Iterable[Row]) -> list[str]:
        """Send one after the other; what was wrong, also with /health meanwhile."""
        first = time.monotonic()
        for each in rows:
            began = time.monotonic()
            tally = assault(self.address, each, ATTACK_S)
            await_health(self.address)  # so that what it leaves behind counts as its own
            self.lines.append(Line(each.name, tally, began, time.monotonic()))
        return self.faults_since(first)

    def faults_since(self, began: float) -> list[str]:
        rows = [line.tally.faults for line in self.lines if line.began >= began]
        samples = self.kept.samples() + self.new.samples()
        health = [s for s in samples if s.due >= began and s.status != 200]
        return [fault for faults in rows for fault in faults] + [f"/health: {s}" for s in health]

    def state(self) -> dict[str, Any]:
        """Everything that must be as before; but the same bytes again are a newer file."""
        answers = [self.adapters.embeddings(name) for name in ("plain", "full", "classes", None)]
        stored = self.adapters.stored()
        files = [(path, size) for path, size, _ in stored["files"]]
        paths = sorted(map(str, self.adapters.data.rglob("*")))
        return stored | {"files": files, "paths": paths, "answers": answers}

    def leases(self) -> float:
        lines = self.adapters.client.get("/metrics").text.splitlines()
        (value,) = (line.split()[1] for line in lines if line.startswith("trunkline_leases "))
        return float(value)


def cases(test: Any, arguments: str | tuple[str, ...]) -> dict[str, Any]:
    """What another file's parametrized test is run with, by its id."""
    (mark,) = (mark for mark in test.pytestmark if mark.args[0] == arguments)
    values = list(mark.args[1])
    return dict(zip(mark.kwargs.get("ids", map(str, values)), values, strict=True))


# Adapter files.


def invalid(reason: str) -> Outcome:
    return Outcome(422, "invalid_adapter", reason)


def file_rows(target: Target) -> Iterator[Row]:
    """Without secrets: a refusal may name a tensor of the file, up to 100 characters of it."""
    digest, put = target.adapters.digest, target.put
    for fault, (file, reason) in (HEADER_FAULTS | set_faults(digest)).items():
        yield row(fault, invalid(reason), put(file))
    good = set_bytes(digest)
    large = torch.ones(4, WIDTH)
    large[0, 0] = 3.4e38
    hot = {A: torch.full((4, WIDTH), 1e30), B: torch.full((3 * WIDTH, 4), 1e30)}
    rank_0 = {A: torch.ones(0, WIDTH), B: torch.ones(3 * WIDTH, 0)}
    zero = {n: torch.zeros_like(t) for n, t in random_adapter(TINY, 1).items() if ".B." in n}
    idle = set_bytes(digest, zero)
    declared = {"x-content-sha256": "0" * 64}, {"content-digest": "sha-256=:AAAA:"}
    kinds = {"content-type": "application/json"}, {"content-encoding": "gzip"}
    yield row("rank 0", invalid("bad_shape"), put(set_bytes(digest, rank_0)))
    yield row("infinite in bfloat16", invalid("not_finite"), put(set_bytes(digest, {A: large})))
    yield row("infinite states", invalid("not_finite"), put(set_bytes(digest, hot)))
    yield row("cut off", invalid("truncated"), *(put(good[:n]) for n in (100, len(good) - 1)))
    yield row("no effect", Outcome(422, "adapter_has_no_effect"), put(idle))
    yield row("allow_zero=yes", INVALID, put(idle, "plain?allow_zero=yes"))
    yield row("other digest", invalid("digest_mismatch"), *(put(good, headers=h) for h in declared))
    yield row("not octets", WRONG_TYPE, *(put(good, headers=h) for h in kinds))


def large_file_rows(target: Target) -> Iterator[Row]:
    def begin(header: str, value: object) -> bytes:
        return target.head("PUT", "/adapters/plain", OCTETS | {header: value})

    entry = '"{:07}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    tensors = file_of("{" + ",".join(entry.format(i) for i in range(100_000)) + "}")
    one = {"a": {"dtype": "F32", "shape": [CAP], "data_offsets": [0, 4 * CAP]}}
    start = file_of(json.dumps(one))
    begun = begin("content-length", len(tensors)), tensors[:4096]
    chunked = begin("transfer-encoding", "chunked"), b"%x\r\n" % (4 * CAP), start, bytes(CAP)
    left = begin("content-length", CAP), start, bytes(1 << 20)
    yield row("100,000 empty tensors", invalid("header_too_large"), target.put(tensors))
    yield row("the start of them", invalid("header_too_large"), begun, whole=False)
    yield row("file over the cap", TOO_LARGE, (begin("content-length", CAP + 1),), whole=False)
    yield row("file over the cap, chunked", TOO_LARGE, chunked, whole=False)
    yield row("client leaves its upload", LEFT, left)


# Names.

ROUTES = [
    *(("PUT", ""), ("GET", ""), ("DELETE", ""), ("DELETE", "/versions/1")),
    *(("POST", f"/{verb}") for verb in ("load", "unload", "pin", "unpin", "verify")),
]


def name_rows(target: Target) -> Iterator[Row]:
    file, request = set_bytes(target.adapters.digest), target.request
    for name in names.BAD_NAMES:
        # What is shorter is in words of the server's own.
        secrets = tuple(sent for sent in (name, unquote(name)) if len(sent) > 5)
        sent = [
            request(method, f"/adapters/{name}{rest}", file if method == "PUT" else b"", OCTETS)
            for method, rest in ROUTES
            if (method, name + rest) != ("GET", "ns/file")  # the file of ns
            and (name or rest or method != "GET")  # GET /adapters/ is the list
        ]
        yield row(f"name {name}", INVALID, *sent, secrets=secrets)
    for name in cases(names.test_a_name_that_differs_by_case_only_is_a_conflict, "name"):
        yield row(f"name {name}", Outcome(409, "name_conflict"), target.put(file, name))
    for name in cases(names.test_a_bad_alias_is_refused, "alias"):
        sent = request("PUT", f"/adapters/plain/aliases/{name}", b'{"version": 1}')
        yield row(f"alias {name}", INVALID, sent)
    for number in cases(names.test_a_bad_version_number_is_refused, "number"):
        sent = request("DELETE", f"/adapters/plain/versions/{number}")
        yield row(f"version {number}", INVALID, sent)
    for name in cases(names.test_a_bad_reference_is_refused_by_inference, "name"):
        sent = [
            request("POST", f"/{route}", body.replace("NAME", f'"{name}"').encode())
            for route, body in names.BODIES.items()
        ]
        yield row(f"reference {name}", INVALID, *sent)


# Bodies and heads.


def body_rows(target: Target) -> Iterator[Row]:
    for name, bad in bodies.BAD.items():
        sent = [target.request("POST", path, bad.body, bad.headers) for path in bodies.INFERENCE]
        yield row(name, Outcome(bad.status, bad.code), *sent, secrets=(bodies.MARK,))
    for name, option in bodies.OPTIONS.items():
        sent = target.post("/encode", {"inputs": "a"} | option)
        yield row(name, INVALID, sent, secrets=(bodies.MARK,))
    arguments = ("path", "body", "status", "code")
    others = cases(bodies.test_the_tokenizer_s_routes_are_as_strict, arguments)
    for path, body, status, code in others.values():
        sent = target.post(path, body)
        yield row(f"{path} {body}", Outcome(status, code), sent, secrets=(bodies.MARK,))


def load_rows(target: Target) -> Iterator[Row]:
    """Too much of what would be good, or too late; and what has no answer."""
    post = target.post
    cap = {"content-length": (8 << 20) + 1}
    over_cap = (target.head("POST", "/encode", bodies.JSON | cap),)
    chunked = target.head("POST", "/encode", bodies.JSON | {"transfer-encoding": "chunked"})
    chunk = chunked, b"900000\r\n", b" " * 0x900000
    long, late = {"inputs": LONG}, {"inputs": LONG, "timeout_ms": 1}
    too_late, too_long = Outcome(504, "deadline_exceeded"), Outcome(413, "too_many_tokens")
    no_labels, hot = Outcome(409, "classifier_not_available"), Outcome(424, "non_finite_result")
    yield row("no classifier", no_labels, post("/classify", ENCODE))
    yield row("result not finite", hot, post("/classify", ENCODE | {"adapter": "hot"}))
    yield row("body over the cap, declared", TOO_LARGE, over_cap, whole=False)
    yield row("body over the cap, chunked", TOO_LARGE, chunk, whole=False)
    yield row("too many tokens", too_long, post("/encode", {"inputs": LONG[:100] + LONG}))
    yield row("deadline over", too_late, post("/encode", late), or_else=OVERLOADED)
    yield row("queue full", OVERLOADED, post("/encode", long), or_else=Outcome(200))
    yield row("client leaves its request", LEFT, post("/encode", long))


def head_rows(target: Target) -> Iterator[Row]:
    wrong = heads.test_a_wrong_head_gets_its_code_in_the_one_shape_and_is_closed
    for name, (sent, *outcome) in cases(wrong, ("head", "status", "code")).items():
        yield row(f"head: {name}", Outcome(*outcome), (sent,), whole=False)
    ambiguous = bodies.test_a_framing_that_can_be_read_in_two_ways_is_400_and_closed
    host = f"host: x\r\nx-api-key: {target.keys['root']}\r\n".encode()
    for name, sent in cases(ambiguous, "request_").items():
        keyed = sent.replace(b"host: x\r\n", host)
        yield row(f"framing: {name}", Outcome(400, "malformed_request"), (keyed,), whole=False)


# Admin.


def key_rows(target: Target) -> Iterator[Row]:
    file, post, put = set_bytes(target.adapters.digest), target.post, target.put
    begun = target.head("PUT", "/adapters/plain", OCTETS | {"content-length": CAP}, None)
    wrong = put(file, headers={"x-api-key": bodies.MARK}, key=None)
    beyond_infer = [
        put(file, key="infer"),
        target.request("DELETE", "/adapters/plain", key="infer"),
        target.request("GET", "/metrics", key="infer"),
    ]
    others = [post("/encode", ENCODE, "other"), put(file, key="other")]
    yield row("no key, no body yet", UNAUTHORIZED, (begun,), whole=False)
    yield row("no key, 8 MiB", UNAUTHORIZED, put(bytes(8 << 20), key=None))
    yield row("a key that is none", UNAUTHORIZED, wrong, secrets=(bodies.MARK,))
    yield row("a key without admin", FORBIDDEN, *beyond_infer)
    yield row("a key without infer", FORBIDDEN, post("/encode", ENCODE, "admin"))
    yield row("a key for other adapters", FORBIDDEN, *others)
    yield row("quota used up", Outcome(429, "quota_exceeded"), post("/encode", ENCODE, "spent"))


def admin_rows(target: Target) -> Iterator[Row]:
    put, request = target.put, target.request
    file, adapters = set_bytes(target.adapters.digest), "/adapters/plain"
    stale = [put(file, headers=h) for h in ({"if-match": '"7"'}, {"if-none-match": "*"})]
    conditions = cases(admin.test_a_condition_that_is_none_is_refused, "headers").values()
    aliases = cases(admin.test_an_alias_body_is_strict, "body").values()
    limits = cases(admin.test_a_limit_is_1_to_1000, "limit").values()
    gone = [request("DELETE", "/adapters/gone"), request("POST", "/adapters/gone/load")]
    lora = {"lora_name": "new", "lora_path": "../../etc/passwd"}
    body = b'{"version": 9}'
    alias = f"{adapters}/aliases/stable"
    yield row("the same bytes again", Outcome(200), put(target.adapters.file(41), "team/one"))
    yield row("stale If-Match", CONFLICT, *stale)
    yield row("If-Match that is none", MALFORMED_HEAD, *(put(file, headers=h) for h in conditions))
    yield row("delete and load of nothing", NO_ADAPTER, *gone)
    yield row("delete of no version", NO_VERSION, request("DELETE", f"{adapters}/versions/9"))
    yield row("alias of no version", NO_VERSION, request("PUT", alias, body))
    yield row(
        "alias body", INVALID, *(request("PUT", alias, json.dumps(b).encode()) for b in aliases)
    )
    yield row("limit", INVALID, *(request("GET", f"/adapters?limit={n}") for n in limits))
    yield row("path out of the import root", FORBIDDEN, target.post("/v1/load_lora_adapter", lora))
    yield row(
        "over the storage quota",
        Outcome(507, "storage_full"),
        put(target.adapters.file(1, ranks=64)),
    )
    yield row("no such path", Outcome(404, "not_found"), request("GET", "/no/such/path"))
    yield row("no such method", Outcome(405, "method_not_allowed"), request("PATCH", "/encode"))


GROUPS = {
    "adapter files": file_rows,
    "large files": large_file_rows,
    "names": name_rows,
    "bodies": body_rows,
    "load": load_rows,
    "heads": head_rows,
    "keys": key_rows,
    "admin": admin_rows,
}


# The tests.


@pytest.fixture(scope="module")
def target(
    tiny_backbone: Path, serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """In bfloat16, where a finite number may become infinite."""
    folder = tmp_path_factory.mktemp("attack")
    ring, data = folder / "keys.json", folder / "data"
    keys = {name: new_key(ring, name, **wishes)[1] for name, wishes in KEYS.items()}
    limits = [word for limit in LIMITS.items() for word in limit]
    served = serve_for_session(
        *(tiny_backbone, "--data", data, "--keys", ring, "--dtype", "bfloat16", *limits)
    )
    url = urlsplit(served.url)
    address = str(url.hostname), url.port or 80
    with (
        served.client(headers=bearer(keys["root"])) as client,
        probing(address, folder, "kept") as kept,
        probing(address, folder, "new") as new,
    ):
        digest = client.get("/info").json()["backbone"]["digest"]
        adapters = Adapters(served, client, data, digest)
        prepare(adapters, keys)
        target = Target(adapters, keys, address, kept, new)
        target.rest()
        yield target
        target.rest()
        time.sleep(0.1)  # until the probes have written what was due
        text = table(target.lines, kept.samples(), new.samples())
    served.process.kill()  # it would drain for long
    served.process.wait()
    print(text)
    if "ATTACK_REPORT" in os.environ:
        Path(os.environ["ATTACK_REPORT"]).write_text(text)


def prepare(adapters: Adapters, keys: Mapping[str, str]) -> None:
    """What some rows need to be there."""
    huge = torch.full((1, WIDTH), 3e38)
    overflows = {"classifier.weight": torch.cat((huge, -huge))}
    hot = set_bytes(adapters.digest, overflows, classes=2)
    for name, file in (("hot", hot), ("team/one", adapters.file(41))):
        assert adapters.put(name, file).status_code == 201
        assert adapters.client.post(f"/adapters/{name}/load").status_code == 200
    spent = adapters.client.post("/encode", json=ENCODE, headers=bearer(keys["spent"]))
    assert spent.status_code == 200


@pytest.fixture(scope="module")
def before(target: Target) -> dict[str, Any]:
    return target.state()


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("group", GROUPS)
def test_each_row_gets_its_code_and_health_answers(target: Target, group: str) -> None:
    faults = target.attack(GROUPS[group](target))
    assert faults == []


@pytest.mark.usefixtures("before")
def test_slow_clients_are_408_and_closed_and_health_answers(target: Target) -> None:
    """All kinds at once, as a head's time is 10 s."""
    upload = target.head("PUT", "/adapters/plain", OCTETS | {"content-length": CAP})
    encode = target.head("POST", "/encode", bodies.JSON | {"content-length": 1000})
    starts = {
        "slow heads": b"GET /health HTTP/1.1\r\nhost: x\r\nx: ",
        "slow bodies": encode + b"{",
        "slow uploads": upload + b"\0\1\0\0\0\0\0\0{",
    }
    rows = [row(name, LATE, (start,)) for name, start in starts.items()]
    began = time.monotonic()
    with ThreadPoolExecutor(len(rows)) as threads:
        tallies = list(threads.map(lambda row: dribble(target.address, row, SLOW_CLIENTS), rows))
    ended = time.monotonic()
    for each, tally in zip(rows, tallies, strict=True):
        target.lines.append(Line(each.name, tally, began, ended))
    faults = target.faults_since(began)
    assert faults == []


def test_nothing_is_left_of_it_and_answers_are_as_before(
    target: Target, before: dict[str, Any]
) -> None:
    wait_until(lambda: target.leases() == 0)  # of the clients that left last
    wait_until(lambda: not any((target.adapters.blobs / "incoming").iterdir()))
    assert target.state() == before
    assert "Traceback" not in target.adapters.served.log.read_text()


def test_an_upload_to_a_draining_server_is_refused_and_health_answers(
    target: Target, before: dict[str, Any]
) -> None:
    """The last: the server takes no upload any more."""
    client = target.adapters.client
    target.adapters.served.process.send_signal(signal.SIGTERM)
    wait_until(lambda: client.get("/ready").status_code == 503)
    upload = target.put(target.adapters.file(2))
    faults = target.attack([row("upload while draining", Outcome(503, "draining"), upload)])
    assert faults == []
    assert target.state() == before
