"""What can go wrong with an adapter: each error names its code, and carries its details as data."""

from typing import Any


class TrunklineError(Exception):
    """A sentence for a person, a code for a program, details as data."""

    code: str = "internal_error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class NotFound(TrunklineError):
    code = "adapter_not_found"


class VersionNotFound(NotFound):
    code = "version_not_found"


class BadName(TrunklineError):
    code = "validation_error"


class Invalid(TrunklineError):
    """An adapter file that is refused; `details["reason"]` is one word for a program."""

    code = "invalid_adapter"

    def __init__(self, reason: str, message: str, **details: Any) -> None:
        super().__init__(message, reason=reason, **details)


class NoEffect(TrunklineError):
    code = "adapter_has_no_effect"
