"""A running server, as the command line speaks with it."""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
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
            self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)
        except (httpx.InvalidURL, ValueError) as error:
            raise click.ClickException(f"{url} is no address of a server: {error}") from error

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, **options: Any) -> Answer:
        """One request; options as httpx takes them."""
        try:
            response = self._http.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise click.ClickException(f"{self.url} can't be reached: {error}") from error
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict) or not (response.is_success or _is_error(body)):
            raise click.ClickException(
                f"{self.url} answered {response.status_code}, but not as a trunkline server does"
            )
        if not response.is_success:
            raise Refused(body)
        return Answer(response.status_code, body)

    def adapters(self) -> Iterator[dict[str, Any]]:
        """Every row of GET /adapters, page by page."""
        after: str | None = ""
        while after is not None:
            page = self.call("GET", "/adapters", params={"limit": PAGE, "after": after}).body
            yield from page["data"]
            after = page["next"]


def path_of(name: str, *rest: str) -> str:
    """The path of an adapter, or of a reference to one."""
    return "/".join(["/adapters", quote(name, safe="/@:"), *rest])


def _is_error(body: dict[str, Any]) -> bool:
    error = body.get("error")
    return isinstance(error, dict) and {"code", "message"} <= set(error)


def on_server(
    shown: Callable[[Answer], RenderableType], fails: Callable[[Answer], bool] = lambda _: False
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
            help="The server.",
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
