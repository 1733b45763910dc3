"""Declared digests of a body: Content-Digest and Repr-Digest (RFC 9530), x-content-sha256.

The first two are structured fields (RFC 9651), dictionaries from algorithm to bytes:
`sha-256=:base64:;parameter=1, sha-512=:base64:`. Every SHA-256 and SHA-512 that is declared must
be the body's, also where one is declared twice; other algorithms are ignored, as the RFC says.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from starlette.requests import Request

from adapters.errors import Invalid
from server.errors import RequestError

ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}  # those that are verified -> hashlib's
HEADERS = ("Content-Digest", "Repr-Digest")

# RFC 9651, section 4.2. Every piece is matched at its place and never tried again, so the time is
# linear: each alternative of a bare item begins with another character, and two items of an inner
# list have a space between them, so that a text is cut into items in one way alone.
_SPACE = r"[ \t]*"
_KEY = r"[a-z*][a-z0-9_.*-]*"
_BARE = (
    r"(?::[A-Za-z0-9+/=]*:"  # bytes
    r'|"(?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*"'  # string
    r"|-?[0-9]{1,15}(?:\.[0-9]{1,3})?"  # integer, decimal
    r"|@-?[0-9]{1,15}"  # date
    r"|\?[01]"  # boolean
    r"|[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*)"  # token
)
_PARAMETER = re.compile(rf";[ ]*{_KEY}(?:={_BARE})?")
_MEMBER_KEY = re.compile(_KEY)
_ITEM = re.compile(f"=({_BARE})")
_INNER = re.compile(rf"=\( *(?:{_BARE}(?: +{_BARE})* *)?\)")
_COMMA = re.compile(f"{_SPACE},{_SPACE}")


@dataclass(frozen=True)
class Declared:
    """One digest that a header declares."""

    header: str
    algorithm: str  # of ALGORITHMS
    digest: bytes


def declared_digests(request: Request) -> list[Declared]:
    """What the headers declare. Raises RequestError (malformed_request)."""
    found = []
    for header in HEADERS:
        lines = request.headers.getlist(header)
        found += [Declared(header, *member) for member in parse_digests(header, lines)]
    for text in request.headers.getlist("x-content-sha256"):
        found.append(Declared("x-content-sha256", "sha-256", _hex(text)))
    return found


def parse_digests(header: str, lines: Sequence[str]) -> list[tuple[str, bytes]]:
    """The (algorithm, digest) of a header's lines, known algorithms alone.

    Raises RequestError (malformed_request) for what is no dictionary, and for a known algorithm
    whose value is not bytes.
    """
    text = ",".join(lines).strip(" ")
    found: list[tuple[str, bytes]] = []
    end = 0
    while end < len(text):
        key = _MEMBER_KEY.match(text, end)
        if key is None:
            _refuse(header)
        item = _ITEM.match(text, key.end()) or _INNER.match(text, key.end())
        end = item.end() if item else key.end()
        while (parameter := _PARAMETER.match(text, end)) is not None:
            end = parameter.end()
        if key[0] in ALGORITHMS:
            found.append((key[0], _bytes(header, item[0][1:] if item else "")))
        if end < len(text):
            comma = _COMMA.match(text, end)
            if comma is None or comma.end() == len(text):
                _refuse(header)
            end = comma.end()
    return found


def _bytes(header: str, value: str) -> bytes:
    """`:base64:`, its padding left out or not."""
    if not value.startswith(":"):
        _refuse(header)
    encoded = value.strip(":").rstrip("=")
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        _refuse(header)


def _hex(text: str) -> bytes:
    """What is not hex is no body's digest, so it is refused as one that is wrong."""
    digits = text.strip().lower().removeprefix("sha256:")
    return bytes.fromhex(digits) if re.fullmatch("[0-9a-f]{64}", digits) else b""


def _refuse(header: str) -> NoReturn:
    raise RequestError(
        "malformed_request",
        f"{header} must be a list as RFC 9530 has it: sha-256=:BASE64:",
        header=header.lower(),
    )


class Verifier:
    """Hashes a body by what its headers declare, and says whether they are right."""

    def __init__(self, declared: Sequence[Declared]) -> None:
        self._declared = declared
        wanted = {each.algorithm for each in declared}
        self._hashes = {name: hashlib.new(ALGORITHMS[name]) for name in wanted}

    def update(self, data: bytes) -> None:
        for each in self._hashes.values():
            each.update(data)

    def check(self) -> None:
        """Raises Invalid, with the header and the algorithm, where a digest is not the body's."""
        for each in self._declared:
            if self._hashes[each.algorithm].digest() != each.digest:
                raise Invalid(
                    "digest_mismatch",
                    f"the bytes are not those that {each.header} declares ({each.algorithm})",
                    header=each.header.lower(),
                    algorithm=each.algorithm,
                )
