"""Query parameters, as strict as bodies: unknown and repeated keys are refused by their names."""

import re
from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import Request

from server.engine.errors import BadInput

Choice = TypeVar("Choice", bound=str)
# A key that is safe to name in an error: a word of ordinary length, nothing of markup
_PLAIN_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")


class Query:
    """The query of a request that may have the keys `known`. Every method raises BadInput."""

    def __init__(self, request: Request, *known: str) -> None:
        self._values: dict[str, str] = {}
        for key, value in request.query_params.multi_items():
            if key not in known:
                raise BadInput(f"unknown query parameter{_named(key)}; known: {_list(known)}")
            if key in self._values:
                raise BadInput(f"the query parameter {key} is given twice")
            self._values[key] = value

    def text(self, name: str, most: int) -> str:
        """A text of at most so many characters; empty where it is not given."""
        value = self._values.get(name, "")
        if len(value) > most:
            raise BadInput(f"{name} may have {most} characters")
        return value

    def choice(self, name: str, choices: Sequence[Choice]) -> Choice:
        """One of the choices; the first where it is not given."""
        value = self._values.get(name, choices[0])
        for choice in choices:
            if choice == value:
                return choice
        raise BadInput(f"{name} must be one of {', '.join(choices)}")

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name, str(default).lower())
        if value not in ("true", "false"):
            raise BadInput(f"{name} must be true or false")
        return value == "true"

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self._values.get(name, str(default))
        if not re.fullmatch(r"[0-9]{1,9}", value) or not low <= int(value) <= high:
            raise BadInput(f"{name} must be a number from {low} to {high}")
        return int(value)


def _named(key: str) -> str:
    return f" {key}" if _PLAIN_KEY.fullmatch(key) else ""


def _list(known: Sequence[str]) -> str:
    return ", ".join(known) or "none"
