"""Shedding: a crowded server refuses from a request's bytes, as the way behind it would."""

import asyncio
import itertools
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fuzz_targets import Wire
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.server import ServerState

from server.app import create_app, direct
from server.connection import Connection
from server.keys import RELOAD_S, Quota, new_key, revoke_key
from server.logs import FACTS
from server.settings import load_settings

ANSWERED_WITHIN_S = 10.0
WAITING = 1000  # tokens, before a device that runs one a second
PLAIN = {"adapter": "plain", "inputs": [5, 6, 7]}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def code(self) -> str:
        error = self.body["error"]
        return str(error["code"] if isinstance(error, dict) else self.body["code"])

    @property
    def identity(self) -> str | None:
        """The request's id in the body; OpenAI's shape has none."""
        error = self.body["error"]
        return (error if isinstance(error, dict) else self.body).get("request_id")


def without_request_id(body: Any) -> Any:
    error = body["error"]
    inner = error if isinstance(error, dict) else body
    return [error if isinstance(error, str) else None, {**inner, "request_id": None}]


class Server:
    """Its application behind connections whose reads are told one by one."""

    def __init__(self, app: FastAPI, secrets: dict[str, str]) -> None:
        self.app, self.secrets = app, secrets
        self.tasks = 0  # requests that reached the application

    async def ask(
        self, body: Any, *reads: int, path: str = "/encode", key: str = "any", kind: str = "json"
    ) -> Answer:
        """The answer to a request that comes in one read, or with ends of reads in its body."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        secret = self.secrets.get(key)
        authorization = f"authorization: Bearer {secret}\r\n" if secret else ""
        head = (
            f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/{kind}\r\n"
            f"{authorization}content-length: {len(raw)}\r\n\r\n"
        )
        ends = [0, *reads, len(raw)]
        parts = [raw[start:end] for start, end in itertools.pairwise(ends)]
        parts[0] = head.encode() + parts[0]
        sent = await self.talk(parts)
        top, _, content = sent.partition(b"\r\n\r\n")
        first, *lines = top.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return Answer(int(first.split()[1]), headers, json.loads(content))

    async def talk(self, parts: list[bytes], answers: int = 1) -> bytes:
        """What is sent when so many are answered to these reads."""
        config = Config(self._count, http=Connection, log_config=None, access_log=False, ws="none")
        config.load()
        config.loaded_app = self._count
        wire, loop = Wire(), asyncio.get_running_loop()
        connection = Connection(config, ServerState(), {}, loop, shed=self.app.state.shed)
        connection.connection_made(wire)
        for part in parts:
            connection.data_received(part)
        async with asyncio.timeout(ANSWERED_WITHIN_S):
            # The transport tells nobody.
            while wire.sent.count(b"HTTP/1.1") < answers or not wire.sent.endswith(b"}"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        connection.connection_lost(None)
        return bytes(wire.sent)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.tasks += 1
        await direct(self.app)(scope, receive, send)

    def crowd(self) -> None:
        engine = self.app.state.server.engine
        engine.admission.permits.take(WAITING)
        engine.rate.note(1, 1.0)

    def metric(self, name: str, **labels: str) -> float:
        registry = self.app.state.server.metrics.registry
        return registry.get_sample_value(f"trunkline_{name}", labels) or 0.0


@asynccontextmanager
async def serving(backbone: Path, folder: Path) -> AsyncIterator[Server]:
    keys, infer = folder / "keys.json", frozenset({"infer"})
    secrets = {
        "any": new_key(keys, "any", scopes=infer)[1],
        "another's": new_key(keys, "another's", scopes=infer, adapters=("other/*",))[1],
        "metrics": new_key(keys, "metrics", scopes=frozenset({"metrics"}))[1],
        "one": new_key(keys, "one", scopes=infer, requests=Quota.parse("1/h"))[1],
    }
    app = create_app(
        load_settings({"backbone": backbone, "data_dir": folder / "data", "keys": keys})
    )
    async with app.router.lifespan_context(app):
        yield Server(app, secrets)


@pytest.mark.parametrize(
    ("body", "options", "code", "shed"),
    [
        (PLAIN, {}, "overloaded", True),
        ({"inputs": "abc"}, {}, "overloaded", True),
        ({"adapters": ["plain", "base"], "inputs": "abc"}, {}, "overloaded", True),
        (PLAIN | {"adapter": "plain@1"}, {"path": "/critic"}, "overloaded", True),
        ({"model": "plain", "input": "abc"}, {"path": "/v1/embeddings"}, "overloaded", True),
        ({"inputs": "abc"}, {"key": "another's"}, "overloaded", True),
        ({"model": "tiny", "input": "abc"}, {"path": "/v1/embeddings"}, "overloaded", False),
        ({"inputs": "abc", "adapter": "plain"}, {"path": "/embed"}, "overloaded", True),
        ({"inputs": "abc"}, {"path": "/"}, "overloaded", True),
        ({"inputs": "abc", "parameters": {"adapter": "plain"}}, {"path": "/"}, "overloaded", False),
        ({"inputs": "abc", "parameters": None}, {"path": "/"}, "overloaded", True),
        ({"query": "a", "texts": ["b"], "adapter": "plain"}, {"path": "/rerank"}, None, True),
        ({"query": "a", "texts": ["b"], "model": "plain"}, {"path": "/v1/rerank"}, None, False),
        ({"inputs": "abc"}, {"path": "/as/plain%401/-/critic"}, "overloaded", True),
        ({"inputs": "abc"}, {"path": "/as/plain/-"}, "overloaded", True),
        ({"model": "x", "input": "a"}, {"path": "/as/plain/-/v1/embeddings"}, "overloaded", True),
        (PLAIN | {"adapter": "full"}, {"path": "/as/plain/-/encode"}, "validation_error", False),
        (PLAIN, {"path": "/as/plain/-/encode", "key": "another's"}, "forbidden", False),
        (PLAIN, {"path": "/as/plain/-/adapters"}, None, False),
        (PLAIN, {"key": "nobody's"}, "unauthorized", False),
        (PLAIN, {"key": "metrics"}, "forbidden", False),
        (PLAIN, {"key": "another's"}, "forbidden", False),
        (PLAIN | {"adapter": "nothing"}, {}, "adapter_not_found", False),
        (PLAIN | {"adapter": "plain@7"}, {}, "version_not_found", False),
        (PLAIN | {"adapter": "NO NAME"}, {}, None, False),
        (PLAIN | {"adapters": ["base"]}, {}, "validation_error", False),
        ({"adapters": ["plain"] * 257, "inputs": "abc"}, {}, "validation_error", False),
        ({"adapter": 5, "inputs": "abc"}, {}, "validation_error", False),
        (PLAIN, {"kind": "cbor"}, "unsupported_media_type", False),
        (b"{" + b'"a":[' * 5000, {}, "malformed_json", False),
        (b"[1]", {}, "validation_error", False),
    ],
)
def test_a_crowded_server_answers_from_the_bytes_as_it_does_behind_them(
    tiny_backbone: Path, tmp_path: Path, body: Any, options: dict, code: str | None, shed: bool
) -> None:
    async def ask_both_ways() -> None:
        async with serving(tiny_backbone, tmp_path) as server:
            server.crowd()
            whole = await server.ask(body, **options)
            assert server.tasks == (0 if shed else 1)
            behind = await server.ask(body, 1, **options)
            assert server.tasks == (1 if shed else 2)
            assert whole.code == (code or behind.code)
            for one, other in ((whole, behind), (behind, whole)):
                assert one.status == other.status
                assert one.headers.keys() <= other.headers.keys()
            assert whole.headers.get("retry-after") == behind.headers.get("retry-after")
            assert without_request_id(whole.body) == without_request_id(behind.body)
            assert whole.identity in (None, whole.headers["x-request-id"])

    asyncio.run(ask_both_ways())


def test_a_server_that_is_not_crowded_answers_what_comes_in_one_read(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    async def ask() -> None:
        async with serving(tiny_backbone, tmp_path) as server:
            answer = await server.ask(PLAIN)
            assert answer.status == 200
            assert answer.body["data"][0]["adapter"]["name"] == "plain"

    asyncio.run(ask())


def test_what_is_shed_is_counted_and_takes_from_the_key_s_quota(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    async def ask() -> None:
        async with serving(tiny_backbone, tmp_path) as server:
            server.crowd()
            first = await server.ask(PLAIN, key="one")
            assert first.code == "overloaded"
            assert server.tasks == 0
            second = await server.ask(PLAIN, key="one")
            assert second.code == "quota_exceeded"
            assert (
                server.metric("requests_total", route="/encode", status="503", code="overloaded")
                == 1
            )
            assert server.metric("request_seconds_count", route="/encode") == 1

    asyncio.run(ask())


def test_a_revoked_key_is_not_shed_but_told(tiny_backbone: Path, tmp_path: Path) -> None:
    async def ask() -> None:
        async with serving(tiny_backbone, tmp_path) as server:
            server.crowd()
            revoke_key(tmp_path / "keys.json", server.secrets["any"].split("_")[1])
            await asyncio.sleep(RELOAD_S)
            assert (await server.ask(PLAIN)).code == "unauthorized"

    asyncio.run(ask())


def test_the_log_line_of_what_is_shed_has_its_request_id(
    tiny_backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> str:
        async with serving(tiny_backbone, tmp_path) as server:
            server.crowd()
            return (await server.ask(PLAIN)).headers["x-request-id"]

    with caplog.at_level(logging.INFO, "trunkline.access"):
        identity = asyncio.run(ask())
    (record,) = [each for each in caplog.records if each.name == "trunkline.access"]
    assert record.__dict__[FACTS] | {"total_ms": 0} == {
        "method": "POST",
        "path": "/encode",
        "route": "/encode",
        "status": 503,
        "total_ms": 0,
        "request_id": identity,
    }


def test_requests_behind_a_shed_one_in_the_same_read_are_answered_in_their_order(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    body = json.dumps(PLAIN)

    async def ask() -> None:
        async with serving(tiny_backbone, tmp_path) as server:
            server.crowd()
            head = (
                "POST /encode HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                f"authorization: Bearer {server.secrets['any']}\r\ncontent-length: {len(body)}\r\n"
            )
            read = "".join(f"{head}x-request-id: {name}\r\n\r\n{body}" for name in "abc").encode()
            sent = await server.talk([read], answers=3)
            assert re.findall(rb"x-request-id: (.)", sent) == [b"a", b"b", b"c"]
            assert sent.count(b"HTTP/1.1 503") == 3
            assert server.tasks == 2  # who waits behind another has a task

    asyncio.run(ask())


def test_a_draining_server_closes_what_it_sheds(tiny_backbone: Path, tmp_path: Path) -> None:
    async def ask() -> None:
        async with serving(tiny_backbone, tmp_path) as server:
            server.crowd()
            assert "connection" not in (await server.ask(PLAIN)).headers
            server.app.state.server.draining = True
            assert (await server.ask(PLAIN)).headers["connection"] == "close"
            assert server.tasks == 0

    asyncio.run(ask())
