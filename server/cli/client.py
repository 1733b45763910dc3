"""A running server, as the command line speaks with it."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import click
import httpx
from rich.console import RenderableType

from adapters.errors import TrunklineError
from server.cli.tables import console
from server.errors import error_body

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT = httpx.Timeout(120, connect=10)  # a load may wait for 30 s, a large file be hashed
PAGE = 1000


@dataclass(frozen=True)
class Answer:
    status: int
    body: dict[str, Any]


class Refused(click.ClickException):
    """The server's sentence and code; its whole answer, for --json."""

    def __init__(self, body: dict[str, Any]) -> None:
        error = body["error"]
        hint = ": here by --key or TRUNKLINE_KEY" if error["code"] == "unauthorized" else ""
        super().__init__(f"{error['message']} ({error['code']}){hint}")
        self.body = body


class Server:
    """Every method raises Refused for an error answer, ClickException where there is none."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        headers = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
        try:
            base, transport = _address(url)
            self._http = httpx.Client(
                base_url=base, transport=transport, headers=headers, timeout=TIMEOUT
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise click.ClickException(f"{url} is no address of a server: {error}") from error

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, **options: Any) -> Answer:
        """One request; options as httpx takes them."""
        with self._faults():
            response = self._http.request(method, path, **options)
        body = self._body(response)
        if body is None or not response.is_success:
            self._refuse(response, body)
        return Answer(response.status_code, body)

    def download(self, path: str, write: Callable[[bytes], Any]) -> Mapping[str, str]:
        """Write the body of a GET, part by part; the headers of the answer.

        Raises as `call`, also where the body is cut off.
        """
        with self._faults(), self._http.stream("GET", path) as response:
            if not response.is_success:
                response.read()
                self._refuse(response, self._body(response))
            for part in response.iter_raw():
                write(part)
            return response.headers

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise click.ClickException(
                f"{self.url} can't be reached: {error}; `trunkline serve` starts a server, and "
                "--url or TRUNKLINE_URL names another address"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise click.ClickException(f"{self.url} can't be reached: {error}") from error

    def _body(self, response: httpx.Response) -> dict[str, Any] | None:
        """A JSON object; None for anything else."""
        try:
            body = response.json()
        except ValueError:
            return None
        return body if isinstance(body, dict) else None

    def _refuse(self, response: httpx.Response, body: dict[str, Any] | None) -> NoReturn:
        if body is None or not _is_error(body):
            raise click.ClickException(
                f"{self.url} answered {response.status_code}, but not as a trunkline server does"
            )
        raise Refused(body)

    def adapters(self, **query: str) -> Iterator[dict[str, Any]]:
        """Every row of GET /adapters, page by page."""
        after: str | None = ""
        while after is not None:
            params = query | {"limit": str(PAGE), "after": after}
            page = self.call("GET", "/adapters", params=params).body
            yield from page["data"]
            after = page["next"]


def _address(url: str) -> tuple[str, httpx.BaseTransport | None]:
    """Base URL and transport: unix:///path is a socket, an address without a scheme is HTTP."""
    if url.startswith("unix:"):
        path = url.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        if not Path(path).is_socket():
            raise click.ClickException(f"{url} can't be reached: there is no socket at {path}")
        return "http://localhost", httpx.HTTPTransport(uds=path)
    return (url if "://" in url else f"http://{url}"), None


def path_of(name: str, *rest: str) -> str:
    """The path of an adapter, or of a reference to one."""
    return "/".join(["/adapters", quote(name, safe="/@:"), *rest])


def _is_error(body: dict[str, Any]) -> bool:
    error = body.get("error")
    return isinstance(error, dict) and {"code", "message"} <= set(error)


def on_server(
    shown: Callable[[Any], RenderableType], fails: Callable[[Any], bool] = lambda _: False
) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """Make a command's callback of a function from a Server to an Answer.

    It gets --url, --key and --json; `shown` is what a person sees of the answer. Exits 1 for an
    error, and for an answer that `fails`.
    """

    def decorate(function: Callable[..., Answer]) -> Callable[..., None]:
        @click.option(
            "--url",
            envvar="TRUNKLINE_URL",
            default=DEFAULT_URL,
            show_default=True,
            show_envvar=True,
            help="The server; a unix socket as unix:///path.",
        )
        @click.option("--key", envvar="TRUNKLINE_KEY", show_envvar=True, help="An API key.")
        @click.option("--json", "as_json", is_flag=True, help="Print the server's JSON.")
        @functools.wraps(function)
        def command(url: str, key: str | None, as_json: bool, **arguments: Any) -> None:
            with _errors(as_json), Server(url, key) as server:
                answer = function(server, **arguments)
            if as_json:
                _print_json(answer.body)
            else:
                console().print(shown(answer))
            if fails(answer):
                raise SystemExit(1)

        return command

    return decorate


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Errors of the server, and those found before it is asked, as sentences with their codes."""
    try:
        try:
            yield
        except TrunklineError as error:
            raise Refused(error_body(error, None)) from error
    except Refused as refused:
        if as_json:
            _print_json(refused.body)
        raise


def _print_json(body: dict[str, Any]) -> None:
    click.echo(json.dumps(body, indent=2, ensure_ascii=False))
