"""Conditional requests (RFC 9110, section 13): If-Match and If-None-Match as values.

Both hold `*` or a list of entity tags, on one header line or several. A weak tag (W/"3") is valid
and never matches, in neither header: every tag of this server is strong. The dates
(If-Modified-Since, If-Unmodified-Since) are ignored, as there is no Last-Modified to compare with.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn

from starlette.requests import Request
from starlette.responses import Response

from adapters.conditions import ANYTHING, Condition
from server.errors import RequestError

MAX_TAGS = 1000  # of one header
# entity-tag, or one comma, with the white space around it; each alternative begins differently
# and repeats one class of characters, so a scan takes linear time
_TAG = re.compile(r'[ \t]*(W/)?"([\x21\x23-\x7e\x80-\xff]*)"[ \t]*')
_COMMA = re.compile(r"[ \t]*,")


def condition_of(request: Request) -> Condition:
    """The conditions of a request. Raises RequestError (malformed_request)."""
    if_match, if_none_match = (
        parse_tags(name, request.headers.getlist(name)) for name in ("If-Match", "If-None-Match")
    )
    return Condition(if_match, if_none_match)


def parse_tags(header: str, lines: Sequence[str]) -> Collection[str] | None:
    """`*` or the strong tags of a header's lines; None where it was not sent.

    Raises RequestError (malformed_request), also for a list without a tag: whoever sends an empty
    condition meant one.
    """
    if not lines:
        return None
    text = ",".join(lines)
    if text.strip(" \t") == ANYTHING:
        return ANYTHING
    tags: set[str] = set()
    found, end = 0, 0
    while end < len(text):
        tag = _TAG.match(text, end)
        if tag is not None:
            found, end = found + 1, tag.end()
            tags |= set() if tag[1] else {tag[2]}
        comma = _COMMA.match(text, end)
        if comma is None and end < len(text):
            _refuse(header)
        end = end if comma is None else comma.end()
    if not 1 <= found <= MAX_TAGS:
        _refuse(header)
    return frozenset(tags)


def _refuse(header: str) -> NoReturn:
    raise RequestError(
        "malformed_request",
        f'{header} must be * or a list of at most {MAX_TAGS} entity tags in quotation marks: "3"',
        header=header.lower(),
    )


def etag(number: int) -> str:
    """The entity tag of a version's number, or of an alias' generation."""
    return f'"{number}"'


def not_modified(
    condition: Condition, number: int | None, more: Mapping[str, str] | None = None
) -> Response | None:
    """304 where If-None-Match names what a read would answer; None where it is to be answered.

    Raises Conflict where If-Match does not hold. What is read exists; its tag is `number`; `more`
    are those of its headers that a 304 has too (RFC 9110, 15.4.5).
    """
    Condition(condition.if_match).check("the adapter", number, exists=True)
    if not condition.fails_if_none_match(number, exists=True):
        return None
    headers = {} if number is None else {"etag": etag(number)}
    return Response(status_code=304, headers=headers | dict(more or {}))
