"""A bare Starlette route on uvicorn: parses a JSON body and answers bytes that it was given.

`python -m loadtest.bench.bare FILE KIND`: what any front end in Python costs at least.
"""

import socket
import sys
from pathlib import Path

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def app(body: bytes, kind: str) -> Starlette:
    async def encode(request: Request) -> Response:
        orjson.loads(await request.body())
        return Response(body, media_type=kind)

    async def ready(_: Request) -> Response:
        return Response()

    return Starlette(routes=[Route("/encode", encode, methods=["POST"]), Route("/ready", ready)])


def main() -> None:
    body, kind = Path(sys.argv[1]).read_bytes(), sys.argv[2]
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app(body, kind), log_config=None, access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
