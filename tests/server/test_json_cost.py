"""A body whose parsing would hold the GIL for too long is refused by counting its bytes."""

import json
import random

import pytest

from server import json_cost
from server.errors import RequestError
from server.json_cost import KEY, OPENING, STRING, VALUE, check_cost

TOKENS = 131_072
LARGEST = 8 << 20


def counted(raw: bytes) -> tuple[int, int]:
    """What json_cost counts, byte by byte."""
    inside, at, quotes, digits, depth, deepest = False, 0, 0, 0, 0, 0
    cost = 0
    while at < len(raw):
        byte = raw[at : at + 1]
        at += 2 if byte == b"\\" else 1
        if byte == b'"':
            inside, quotes = not inside, quotes + 1
        if inside:
            continue
        cost += {b",": VALUE, b":": KEY, b"[": OPENING, b"{": OPENING}.get(byte, 0)
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(byte, 0)
        deepest, digits = max(deepest, depth), digits + byte.isdigit()
    return cost + STRING * quotes // 2 + digits, deepest


def test_the_count_is_that_of_a_reader_whatever_the_strings_hold(monkeypatch) -> None:
    monkeypatch.setattr(json_cost, "PIECE", 7)
    monkeypatch.setattr(json_cost, "DIGITS", 1)
    draw = random.Random(0)
    parts = [b"\\\\", b'\\"', b"\\n", b",", b"[", b"a", b"1", b"}", b":"]
    for _ in range(200):
        text = b'"' + b"".join(draw.choices(parts, k=draw.randrange(9))) + b'"'
        raw = b"".join(draw.choices([text, b",", b"[", b"{", b"}", b"]", b":", b"12", b" "], k=20))
        assert json_cost._count(raw) == counted(raw), raw


@pytest.mark.parametrize(
    "unit",
    ["[1]", "{}", '{"a":1}', '{"text":"a","m":[[[[1]]],[[[2]]]]}', '"a"', "[[]]", "9" * 30],
)
def test_8_mb_of_small_values_are_refused(unit: str) -> None:
    raw = ('{"inputs":[' + ",".join([unit] * (LARGEST // (len(unit) + 1))) + "]}").encode()
    with pytest.raises(RequestError) as refused:
        check_cost(raw, TOKENS)
    assert refused.value.code == "too_many_inputs"


def test_as_many_different_keys_are_refused() -> None:
    raw = ("{" + ",".join(f'"{key:x}":0' for key in range(200_000)) + "}").encode()
    with pytest.raises(RequestError):
        check_cost(raw, TOKENS)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [[1_000_000 + i for i in range(64)]] * (TOKENS // 64)},  # every id that fits
        {"documents": [{"text": "a, [b]: {c}" * 50, "title": "t", "id": 1}] * 2048},
        {"inputs": "a,[{:" * (LARGEST // 6)},
        {"inputs": ['"\\' * 100] * 2048},
    ],
    ids=["ids", "documents", "a text that looks like JSON", "escapes"],
)
def test_what_the_other_limits_allow_is_not_refused(body: dict[str, object]) -> None:
    check_cost(json.dumps(body).encode(), TOKENS)


def test_what_the_parser_refuses_for_its_depth_is_left_to_it() -> None:
    check_cost(b'{"inputs":' * 100_000, TOKENS)
