"""Fields of an answer that are not always there."""

from typing import Any

from pydantic import Field


def sometimes(description: str | None = None) -> Any:
    """A field that may be left out, but is never null where it is there."""
    return Field(default_factory=lambda: None, description=description)
