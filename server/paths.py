"""The path of a request as everything behind it sees it: without prefix and trailing slash."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAMES_PATHS = ("/docs", "/openapi.json")  # FastAPI's, which name paths of the server


def routed(path: str, root_path: str = "") -> str:
    """The path that is guarded, routed and logged.

    A proxy may pass `root_path`, the prefix of its address, on or strip it; one slash at the end
    means nothing. Pure, and the same again of its own result unless that begins with the prefix.
    """
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        path = path[len(root_path) :] or "/"
    return path[:-1] if path.endswith("/") and len(path) > 1 else path


class Paths:
    """Pure ASGI: the scope's path is `routed`; a location within this server gets the prefix."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = routed(scope["path"], self.root_path)
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
