"""`/as/{reference}/-/...`: any inference route, under the adapter that the path names."""

from collections.abc import Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

NAMED = "trunkline.reference"  # of a scope: the adapter reference that its path names
PREFIX, MARK = "/as/", "/-"
# Beside the inference routes: what a client asks of a base URL before it sends anything.
READS = {"/v1/models", "/health", "/ready", "/info"}
MODELS = "/v1/models/"


@dataclass(frozen=True)
class NamedPath:
    """A path below `/as/{reference}/-`: the reference, and the route's own path."""

    reference: str
    path: str


def split_path(path: str) -> NamedPath | None:
    """The parts of a decoded path; None where it names no adapter.

    No part of an adapter's name can be `-` alone, so the first `/-/` ends the reference.
    """
    if not path.startswith(PREFIX):
        return None
    reference, mark, rest = (path + "/").removeprefix(PREFIX).partition(MARK + "/")
    if not mark or not reference:
        return None
    return NamedPath(reference, "/" + rest.strip("/"))


def route_path(path: str) -> str:
    """The path without the adapter that it may name: what an error's shape goes by."""
    named = split_path(path)
    return path if named is None else named.path


def reference_of(scope: Scope) -> str | None:
    """The adapter reference that the request's path named."""
    reference: str | None = scope.get(NAMED)
    return reference


class NamedPaths:
    """Pure ASGI: an inference route below `/as/{reference}/-` goes on as the route itself.

    The scope then carries the reference. Every other path is left as it is, so an admin route below
    `/as/` is one that nobody serves. `posts` are the inference routes.
    """

    def __init__(self, app: ASGIApp, posts: Collection[str]) -> None:
        self.app, self.posts = app, frozenset(posts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            named = split_path(scope["path"])
            if named is not None and self._serves(scope["method"], named.path):
                scope["path"], scope[NAMED] = named.path, named.reference
        await self.app(scope, receive, send)

    def _serves(self, method: str, path: str) -> bool:
        if path == "/":  # asked with GET it is the console
            return method not in ("GET", "HEAD")
        return path in self.posts or path in READS or path.startswith(MODELS)
