"""Patterns of the adapter names that a key may use: which are refused, and which surprise."""

import re

_PATTERN = re.compile(r"[a-z0-9._/*?\[\]!-]+")
_PREFIX = re.compile(r".*[a-z0-9._-]\*")


def pattern_fault(pattern: str) -> str | None:
    """Why no adapter's name can match the pattern; None where one can."""
    if _PATTERN.fullmatch(pattern):
        return None
    return (
        f"{pattern!r} matches no adapter: names have a-z, 0-9 and . _ - /, and a pattern "
        "* ? [ ] beside them"
    )


def warning_of(pattern: str) -> str | None:
    """What the pattern matches beyond what its author may mean; None where nothing is likely.

    A * matches any characters, a / among them, so acme* matches acme-evil/x and acme2 too.
    """
    if not _PREFIX.fullmatch(pattern):
        return None
    prefix = pattern.rpartition("*")[0]
    wider = f"{pattern} matches every name that begins like that, {prefix}-other/x too"
    if "/" in prefix:
        return f"{wider[: wider.rindex(',')]}, {prefix}-other too"
    return f"{wider}; {prefix}/* is the namespace {prefix} alone"
