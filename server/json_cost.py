"""How long the parser will hold the GIL over a body, counted from its bytes before it is parsed.

The JSON parser and its validation hold the GIL for the whole of a call: 8 MB of keys took 1.4 s, a
million rows 0.35 s, and nothing else of the server ran meanwhile. What they cost is the Python
objects that they make, and those can be counted by the commas, brackets, colons and quotes outside
of strings. Counting takes 8 ms a megabyte, in pieces of half a millisecond.
"""

import numpy as np
from numpy.typing import NDArray

from server.errors import RequestError

PIECE = 64 << 10
MAX_DEPTH = 200  # the parser stops at this depth, whatever follows
# Units of about 50 ns of a 2.6 GHz core, measured with jiter 0.12: a number or any other value (by
# its comma), a list or an object, a string, a key with its place in an object; and digits, four of
# them a unit.
VALUE, OPENING, STRING, KEY, DIGITS = 1, 3, 3, 24, 4
# So many units took 10 to 45 ms. A request of 131,072 token ids has 300,000.
MAX_COST = 840_000

_COMMA, _COLON, _QUOTE = b",:" + b'"'
_OPEN, _CLOSE = (0x5B, 0x7B), (0x5D, 0x7D)  # [ { and ] }


def check_cost(raw: bytes, max_tokens: int) -> None:
    """Raises RequestError for a body that would hold the GIL for too long.

    The limit lets a request of `max_tokens` ids pass, however many those are.
    """
    limit = max(MAX_COST, 4 * max_tokens)
    if _at_most(raw) <= limit:
        return
    cost, depth = _count(raw)
    if cost > limit and depth <= MAX_DEPTH:  # else the parser refuses it at once
        raise RequestError(
            "too_many_inputs",
            "the body has too many values for one request: send fewer rows, ids or fields at once",
        )


def _at_most(raw: bytes) -> int:
    """The cost if none of the bytes were inside a string."""
    count = raw.count
    openings = count(b"[") + count(b"{")
    cost = VALUE * count(b",") + OPENING * openings + KEY * count(b":")
    digits = len(raw) - len(raw.translate(None, b"0123456789"))
    return cost + STRING * count(b'"') // 2 + digits // DIGITS


def _count(raw: bytes) -> tuple[int, int]:
    """The cost, and the deepest nesting."""
    cost = strings = depth = deepest = at = 0
    inside = False  # a string
    while at < len(raw):
        piece = raw[at : at + PIECE]
        escapes = len(piece) - len(piece.rstrip(b"\\"))
        if escapes % 2:  # the last of them escapes the first byte of the next piece
            piece = raw[at : at + PIECE + 1]
        at += len(piece)
        plain = _without_escapes(piece)
        codes = np.frombuffer(plain, np.uint8)
        quotes = codes == _QUOTE
        outside = ~np.bitwise_xor.accumulate(quotes) if not inside else _within(quotes)
        strings += (ends := int(np.count_nonzero(quotes)))
        inside ^= bool(ends % 2)
        cost += _cost_of(codes, outside)
        depth, deepest = _depth_of(codes, outside, depth, deepest)
    return cost + STRING * strings // 2, deepest


def _within(quotes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is outside of strings in a piece that begins inside one."""
    outside: NDArray[np.bool_] = np.bitwise_xor.accumulate(quotes)
    return outside


def _without_escapes(piece: bytes) -> bytes:
    """The piece without escaped backslashes and quotes, which begin and end no string."""
    if b"\\" not in piece:
        return piece
    return piece.replace(b"\\\\", b"").replace(b'\\"', b"")


def _cost_of(codes: NDArray[np.uint8], outside: NDArray[np.bool_]) -> int:
    def number(of: NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(of & outside))

    openings = number((codes == _OPEN[0]) | (codes == _OPEN[1]))
    digits = number((codes >= 0x30) & (codes <= 0x39))
    values, keys = number(codes == _COMMA), number(codes == _COLON)
    return VALUE * values + OPENING * openings + KEY * keys + digits // DIGITS


def _depth_of(
    codes: NDArray[np.uint8], outside: NDArray[np.bool_], depth: int, deepest: int
) -> tuple[int, int]:
    """The depth at the end of the piece, and the deepest until there."""
    opening = ((codes == _OPEN[0]) | (codes == _OPEN[1])) & outside
    closing = ((codes == _CLOSE[0]) | (codes == _CLOSE[1])) & outside
    steps = opening.astype(np.int32) - closing.astype(np.int32)
    depths = depth + np.cumsum(steps)
    if not len(depths):
        return depth, deepest
    return int(depths[-1]), max(deepest, int(depths.max()))
