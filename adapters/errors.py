"""What can go wrong with an adapter: each error names its code, and carries its details as data."""

from typing import Any


class TrunklineError(Exception):
    """A sentence for a person, a code for a program, details as data."""

    code: str = "internal_error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def again(self) -> "TrunklineError":
        """A new error that says the same.

        An error that is kept is raised for several requests, and each adds details of its own.
        """
        new = type(self).__new__(type(self), self.message)
        new.__dict__.update(self.__dict__)
        new.details = dict(self.details)
        return new


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


class ImportRefused(ValueError):
    """A training checkpoint that can't become a trunk or an adapter set: the reason, the remedy."""


class Conflict(TrunklineError):
    """A condition (If-Match, If-None-Match) that no longer holds."""

    code = "version_conflict"


class NameConflict(TrunklineError):
    code = "name_conflict"


class PoolFull(TrunklineError):
    """No room among the slots, and none to be had by eviction."""

    code = "overloaded"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=1)


class StorageFull(TrunklineError):
    code = "storage_full"


class ReadOnly(TrunklineError):
    """The disk takes no writes; what is there is still served."""

    code = "read_only"


class Damaged(TrunklineError):
    """A stored file is not what its digest says."""

    code = "adapter_damaged"


class Unreadable(TrunklineError):
    """A stored file can't be read now, for a reason that says nothing about its bytes."""

    code = "overloaded"


class Unwritten(TrunklineError):
    """A write failed for a reason that may pass by itself: no file descriptor, an I/O error."""

    code = "overloaded"


class InUse(TrunklineError):
    """Another process has the data folder."""

    code = "in_use"


class RegistryLost(TrunklineError):
    """The registry is missing, broken, or older than what the files beside it show."""

    code = "registry_lost"
