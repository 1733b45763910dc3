"""Conditions of a change (RFC 9110, section 13): which tags a caller expects to be current.

The registry holds them against its own state inside the write transaction, so a condition that
held before a change holds for the change itself.
"""

from collections.abc import Collection
from dataclasses import dataclass

from adapters.errors import Conflict

ANYTHING = "*"  # matches whatever exists


@dataclass(frozen=True)
class Condition:
    """`if_match` and `if_none_match` are None where not given, else `*` or a set of strong tags.

    A tag is what stands between its quotation marks: 3 of "3".
    """

    if_match: Collection[str] | None = None
    if_none_match: Collection[str] | None = None

    def check(self, what: str, current: int | None, exists: bool) -> None:
        """Raises Conflict unless `what`, whose tag is the number `current`, is as expected.

        `current` is None where there is no tag to match; `exists` is what `*` asks for.
        """
        if self.if_match is not None and not _matches(self.if_match, current, exists):
            raise Conflict(
                f"If-Match does not hold: {what} {_state(current, exists)}",
                condition="if-match",
                current=current,
            )
        if self.fails_if_none_match(current, exists):
            raise Conflict(
                f"If-None-Match does not hold: {what} exists already, and {_state(current, exists)}"
                if self.if_none_match == ANYTHING
                else f"If-None-Match does not hold: {what} {_state(current, exists)}",
                condition="if-none-match",
                current=current,
            )

    def fails_if_none_match(self, current: int | None, exists: bool) -> bool:
        """Whether If-None-Match was given and matches: a read is answered with 304 then."""
        return self.if_none_match is not None and _matches(self.if_none_match, current, exists)


def exactly(number: int) -> Condition:
    """If-Match with this one number."""
    return Condition(if_match={str(number)})


UNCONDITIONAL = Condition()
MUST_BE_NEW = Condition(if_none_match=ANYTHING)


def _matches(tags: Collection[str], current: int | None, exists: bool) -> bool:
    if tags == ANYTHING:
        return exists
    return current is not None and str(current) in tags


def _state(current: int | None, exists: bool) -> str:
    if not exists:
        return "does not exist"
    return "has no current version" if current is None else f"is at {current}"
