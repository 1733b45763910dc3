"""The path of a request as everything behind it sees it: without prefix and trailing slash."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAMES_PATHS = ("/docs", "/openapi.json")  # FastAPI's, which name paths of the server
NO_NAME = "/adapters/"


def routed(path: str, root_path: str = "", method: str = "GET") -> str:
    """The path that is guarded, routed and logged.

    A proxy may pass `root_path`, the prefix of its address, on or strip it; one slash at the end
    means nothing, but to change `/adapters/` is to change an adapter without a name, not the list.
    """
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        path = path[len(root_path) :] or "/"
    if path == "/" or not path.endswith("/"):
        return path
    if path == NO_NAME and method in ("PUT", "DELETE"):
        return path
    return path[:-1]


class Paths:
    """Pure ASGI: the scope's path is `routed`; a location within this server gets the prefix."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = routed(scope["path"], self.root_path, scope["method"])
            # For the addresses in these two. Elsewhere Starlette would expect it in the path too.
            scope["root_path"] = self.root_path if scope["path"] in NAMES_PATHS else ""
        if not self.root_path:
            await self.app(scope, receive, send)
            return
        prefix = self.root_path.encode("ascii")

        async def send_with_prefix(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, prefix + value if name == b"location" and value[:1] == b"/" else value)
                    for name, value in message.get("headers", ())
                ]
            await send(message)

        await self.app(scope, receive, send_with_prefix)
