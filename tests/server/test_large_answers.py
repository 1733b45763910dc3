"""Large answers: written in pieces off the event loop, sent as read, bounded in memory by key."""

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
