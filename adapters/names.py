"""Adapter names and references to them: name, name@3, name@stable, name@sha256:<hex>."""

import re
from dataclasses import dataclass

from adapters.errors import BadName

BASE = "base"  # the backbone alone, never an adapter's name
CURRENT = "current"  # the alias behind a bare name
# The part of a route behind an adapter's name; a namespaced name must not end in one.
ROUTE_WORDS = {
    "load", "unload", "pin", "unpin", "verify", "versions", "aliases", "file", "traffic",
}  # fmt: skip
MIN_DIGEST_PREFIX = 12

# For documents: what check_name and check_alias take, but for lengths and for words and numbers
# that mean something else.
_DOCUMENTED = r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*\.?"
NAME_PATTERN = f"^{_DOCUMENTED}(/{_DOCUMENTED})?$"
ALIAS_PATTERN = f"^{_DOCUMENTED}$"

_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(rf"sha256:[0-9a-f]{{{MIN_DIGEST_PREFIX},64}}")


@dataclass(frozen=True)
class Reference:
    """What a request names: at most one of version, digest (a prefix) and alias."""

    name: str
    version: int | None = None
    digest: str | None = None
    alias: str | None = None


def check_name(name: str) -> None:
    """Raises BadName unless `name` may be an adapter's: namespace/name or name, FORMAT's rule."""
    parts = name.split("/")
    if len(parts) > 2 or not all(_PART.fullmatch(part) and ".." not in part for part in parts):
        raise BadName(
            "an adapter name is 1 to 64 of a-z 0-9 . _ - beginning with a letter or digit, without "
            "'..', after at most one namespace/"
        )
    if name == BASE:
        raise BadName(f"'{BASE}' means the backbone alone and can't name an adapter")
    if len(parts) == 2 and parts[1] in ROUTE_WORDS:
        raise BadName(f"'{parts[1]}' is a route and can't end a name with a namespace")


def check_alias(alias: str) -> None:
    """Raises BadName unless `alias` may be one: a name's part that can't be taken for a version."""
    if not _PART.fullmatch(alias) or alias.isdigit() or ".." in alias:
        raise BadName("an alias is 1 to 64 of a-z 0-9 . _ - and not a number")


def parse_reference(text: str) -> Reference:
    """Raises BadName for what names no adapter, in any state of the registry."""
    name, at, rest = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if _VERSION.fullmatch(rest):
        return Reference(name, version=int(rest))
    if _DIGEST.fullmatch(rest):
        return Reference(name, digest=rest)
    check_alias(rest)
    return Reference(name, alias=rest)


def what_is_missing(reference: Reference) -> str:
    """Of a reference to nothing, whose name is there."""
    if reference.version is not None:
        return f"{reference.name} has no version {reference.version}"
    if reference.digest is not None:
        return f"{reference.name} has no version of the digest {reference.digest}"
    if reference.alias is not None:
        return f"{reference.name} has no alias {reference.alias}, or it points to nothing"
    return f"{reference.name} has no current version: promote one"
