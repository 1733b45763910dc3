"""Large answers: written in pieces off the event loop, sent as read, bounded in memory by key."""

import json
import re
import socket
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import orjson
import pytest
import safetensors.torch
import torch
from adapter_client import wait_until
from conftest import TINY, Serve, Served

from server.answer_memory import AnswerMemory, Held
from server.engine.errors import Overloaded
from server.json_pieces import PIECE_VALUES, Items, dumps, pieces
from server.keys import new_key

MATRIX = np.arange(3 * PIECE_VALUES, dtype=np.float32).reshape(-1, 512)
CONTENTS = {
    "a plain object": {"a": [1, None, "é\n"], "b": {}},
    "no items": {"data": Items([]), "model": "m"},
    "items in groups": {"data": Items(({"index": i} for i in range(10)), 4), "usage": {"n": 1}},
    "items of items": Items([{"top": Items(range(5), 2), "at": 1}, {"top": Items([]), "at": 2}]),
    "an object of objects": {"critic": {"score": None, "tokens": Items(range(3), 2)}},
    "a large matrix": MATRIX,
    "large matrices": Items([MATRIX, MATRIX[:1]]),
    "a matrix in an object": {"embedding": MATRIX},
}


def of_lists(content: object) -> object:
    """The content without lazy parts."""
    if isinstance(content, Items):
        return [of_lists(item) for item in content.items]
    if isinstance(content, dict):
        return {name: of_lists(value) for name, value in content.items()}
    return content.tolist() if isinstance(content, np.ndarray) else content


def fresh(name: str) -> object:
    """The content, whose iterators nobody has read."""
    content = CONTENTS[name]
    if name == "items in groups":
        return {"data": Items(({"index": i} for i in range(10)), 4), "usage": {"n": 1}}
    return content


@pytest.mark.parametrize("name", CONTENTS)
def test_pieces_are_the_same_json_as_one_call_makes(name: str) -> None:
    expected = of_lists(fresh(name))
    assert orjson.loads(b"".join(pieces(fresh(name)))) == expected
    assert orjson.loads(dumps(fresh(name))) == expected


def test_no_piece_of_a_large_matrix_is_large() -> None:
    assert max(map(len, pieces(Items([MATRIX, MATRIX])))) <= 20 * PIECE_VALUES


def test_one_key_fills_half_of_the_memory_and_another_finds_room() -> None:
    memory = AnswerMemory(100)
    held = [memory.take("a", 10) for _ in range(5)]
    with pytest.raises(Overloaded) as refused:
        memory.take("a", 10)
    assert refused.value.details["retry_after_s"] > 0
    other = memory.take("b", 20)
    held[0].shrink(4)
    assert memory.held == 64
    for each in (*held, other):
        each.shrink(0)
    assert memory.held == 0
    assert memory.take("a", 1000).size == 1000  # an empty server takes any
    Held().shrink(0)  # of an answer that was not counted


MOST_READERS = 12
ROWS = [[1] * 64] * 480
ASK = {"inputs": ROWS, "outputs": ["tokens"]}  # 7 MB, more than the kernel takes
MEMORY = 24 << 20


@pytest.fixture(scope="module")
def small(tiny_backbone: Path, serve_for_session: Serve) -> tuple[Served, dict[str, str]]:
    """A server that holds 24 MiB of answers, with two keys."""
    ring = tiny_backbone.parent / "keys.json"
    keys = {name: new_key(ring, name, scopes={"infer", "metrics"})[1] for name in "ab"}
    arguments = ("--keys", ring, "--answer-memory", str(MEMORY), "--max-queue-s", "30")
    return serve_for_session(tiny_backbone, *arguments), keys


def unread(stack: ExitStack, served: Served, key: str) -> int:
    """Ask for a large answer and read its status alone; the kernel takes little of the rest."""
    url = urlsplit(served.url)
    connection = socket.socket()
    stack.enter_context(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((url.hostname, url.port))
    body = json.dumps(ASK).encode()
    head = f"POST /encode HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-type: application/json"
    connection.sendall(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return int(connection.recv(12).split()[1])


def answer_bytes(served: Served, key: str) -> int:
    text = httpx.get(f"{served.url}/metrics", headers={"x-api-key": key}).text
    (value,) = re.findall(r"^trunkline_answer_bytes (\S+)$", text, re.MULTILINE)
    return int(float(value))


def test_clients_that_do_not_read_hold_a_bounded_memory_and_others_are_served(
    small: tuple[Served, dict[str, str]],
) -> None:
    """One key's slow readers are refused with 503 at half of the memory; another key has room."""
    served, keys = small
    statuses = []
    with ExitStack() as stack:
        while 503 not in statuses and len(statuses) < MOST_READERS:
            statuses.append(unread(stack, served, keys["a"]))
        assert set(statuses) == {200, 503}
        assert 0 < answer_bytes(served, keys["a"]) <= MEMORY // 2
        answer = httpx.post(f"{served.url}/encode", json=ASK, headers={"x-api-key": keys["b"]})
        assert answer.status_code == 200
    wait_until(lambda: answer_bytes(served, keys["a"]) == 0)  # they left


def test_a_large_answer_is_that_of_its_rows_one_by_one(
    small: tuple[Served, dict[str, str]],
) -> None:
    """In JSON and in safetensors, as the library reads it."""
    served, keys = small
    headers = {"x-api-key": keys["b"]}
    with served.client(headers=headers) as client:
        body = ASK | {"outputs": ["tokens", "embedding"], "adapter": "full"}
        body["inputs"] = ROWS[:64]
        many = client.post("/encode", json=body)
        assert int(many.headers["content-length"]) == len(many.content)
        few = client.post("/encode", json=body | {"inputs": ROWS[:1]}).json()["data"][0]
        rows = many.json()["data"]
        assert [row["index"] for row in rows] == list(range(64))
        assert [token["id"] for token in rows[-1]["tokens"]] == ROWS[-1]
        hidden = [[token["hidden"] for token in row["tokens"]] for row in (rows[0], few)]
        assert np.allclose(*hidden, atol=1e-5)
        accept = {"accept": "application/vnd.safetensors"}
        tensors = safetensors.torch.load(client.post("/encode", json=body, headers=accept).content)
        assert tensors["63.tokens"].shape == (64, TINY.n_embd)
        assert torch.allclose(tensors["0.tokens"], torch.tensor(hidden[0]), atol=1e-5)
