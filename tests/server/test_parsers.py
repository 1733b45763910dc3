"""Mutated heads, bodies and adapter headers: refused by the table, or read as others read them.

`make fuzz` runs the same checks for longer, guided by coverage.
"""

import random
from collections.abc import Callable

import pytest
from fuzz_targets import CHECKS, SEEDS
from hypothesis import given, settings
from hypothesis import strategies as st

PIECES = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\ud800", b"NaN", b"1e999", b"-0", b"\xff",
    b"\x00", b"\r\n", b"\r\n\r\n", b"\n", b" ", b"0" * 40, b"host: b\r\n", b"content-length: 9\r\n",
    b"transfer-encoding: chunked\r\n", b"HTTP/1.0", b"expect: 100-continue\r\n",
]  # fmt: skip


def mutated(data: bytes, dice: random.Random) -> bytes:
    """A few pieces put in, bytes changed and stretches cut out or doubled."""
    found = bytearray(data)
    for _ in range(dice.randrange(1, 5)):
        at = dice.randrange(len(found) + 1)
        end = min(len(found), at + dice.randrange(12))
        change = dice.randrange(4)
        if change == 0:
            found[at:at] = dice.choice(PIECES)
        elif change == 1:
            del found[at:end]
        elif change == 2:
            found[at:at] = found[at:end]
        elif at < len(found):
            found[at] = dice.randrange(256)
    return bytes(found)


@pytest.mark.parametrize("check", CHECKS)
def test_a_seed_is_taken(check: Callable[[bytes], bool]) -> None:
    assert all(check(seed) for seed in SEEDS[check])


@pytest.mark.parametrize("check", CHECKS)
def test_mutated_bytes_are_refused_by_the_table_or_taken(check: Callable[[bytes], bool]) -> None:
    dice = random.Random(0)
    taken = sum(check(mutated(dice.choice(SEEDS[check]), dice)) for _ in range(600))
    assert 0 < taken < 600


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_any_bytes_are_refused_by_the_table(data: bytes) -> None:
    for check in CHECKS:
        check(data)
