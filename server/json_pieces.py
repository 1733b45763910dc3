"""JSON written in pieces, so that no single call holds the GIL for long."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import orjson

PIECE_VALUES = 16_384  # numbers of one call: about a millisecond


class Items:
    """A JSON array whose items are made while it is written, `group` of them in one call.

    Items that hold an `Items` themselves, or a large matrix, need a group of 1.
    """

    def __init__(self, items: Iterable[Any], group: int = 1) -> None:
        self.items, self.group = items, group


def dumps(content: Any) -> bytes:
    """The content in one call."""
    return orjson.dumps(content, default=_listed, option=orjson.OPT_SERIALIZE_NUMPY)


def pieces(content: Any) -> Iterator[bytes]:
    """The content's JSON in order; joined they are `dumps` of it."""
    if isinstance(content, Items):
        yield from _array(content)
    elif _is_large(content):
        yield from _array(Items(content, max(1, PIECE_VALUES // content[0].size)))
    elif isinstance(content, dict) and any(map(_divides, content.values())):
        yield from _object(content)
    else:
        yield dumps(content)


def _listed(content: Any) -> list[Any]:
    if isinstance(content, Items):
        return list(content.items)
    raise TypeError(type(content).__name__)


def _is_large(content: Any) -> bool:
    return isinstance(content, np.ndarray) and content.ndim > 1 and content.size > PIECE_VALUES


def _divides(content: Any) -> bool:
    """Whether it is to be written in more pieces than one."""
    if isinstance(content, dict):
        return any(map(_divides, content.values()))
    return isinstance(content, Items) or _is_large(content)


def _object(content: dict[str, Any]) -> Iterator[bytes]:
    before = b"{"
    for name, value in content.items():
        yield before + dumps(name) + b":"
        yield from pieces(value)
        before = b","
    yield b"}"


def _array(items: Items) -> Iterator[bytes]:
    before = b"["
    for group in _groups(items):
        yield before
        if items.group == 1:
            yield from pieces(group[0])
        else:
            yield dumps(group)[1:-1]
        before = b","
    yield b"[]" if before == b"[" else b"]"


def _groups(items: Items) -> Iterator[list[Any]]:
    rest = iter(items.items)
    while group := list(islice(rest, items.group)):
        yield group
