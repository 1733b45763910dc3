"""trunkline serve."""

import gc
import ipaddress
import logging
import os
import socket
import sys
import threading
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

import click
import uvicorn
from fastapi import FastAPI

from adapters.errors import TrunklineError
from model.checkpoint import BackboneError
from model.quantized import Int8Unavailable
from server import __version__
from server.app import create_app, direct
from server.cli.trunk_folder import TrunkFolder
from server.connection import BoundedReads
from server.keys import BadKeys, KeyRing
from server.logs import announce, configure_logs
from server.settings import BYTES, BadSettings, Settings, load_settings
from server.state import ServerState

log = logging.getLogger("trunkline.serve")

MAX_NAMES = 8  # of adapters, told at the start
ENGINE_LOST = 70  # exit status: the engine died or is stuck; start the server again
# Longer than clients and balancers keep an idle connection: who closes first risks the request that
# is on its way. uvicorn's 5 s are httpx's own.
KEEP_ALIVE_S = 75
# Connections accepted in a turn of the event loop, which accepts one a listener: behind 2,000 that
# send large bodies and leave, a new one waited for 24 s with one listener, for 3.5 s with these.
ACCEPTS = 8
YOUNG_OBJECTS = 10_000  # before they are looked through for cycles
START_FAULTS = (BadSettings, BadKeys, BackboneError, Int8Unavailable, TrunklineError)
NOT_FLAGS = {"backbone", "fair_shares"}  # an argument; a table of the TOML file


def _flag(name: str) -> click.Option:
    """The flag of one settings field, under its own name, with its own help."""
    field = Settings.model_fields[name]
    default = "" if field.default is None else f" [default: {field.default}]"
    short = ["--data"] if name == "data_dir" else []
    if name == "insecure":
        return click.Option(["--insecure"], is_flag=True, default=None, help=str(field.description))
    return click.Option(
        [f"--{name.replace('_', '-')}", *short, name],
        type=str if name in BYTES else _flag_type(field.annotation),
        help=f"{field.description}{default}",
    )


def _flag_type(annotation: Any) -> Any:
    choices = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is Literal:
        return click.Choice(choices)
    kind = choices[0] if choices else annotation  # of `Path | None` the Path
    return click.Path(path_type=Path) if kind is Path else kind


def _serve(backbone: Path | None, config: Path | None, **flags: Any) -> None:
    """Serve BACKBONE, a folder, or the demo trunk, over HTTP.

    Every setting is also read from TRUNKLINE_<NAME> in the environment, and from a TOML file.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = load_settings(given | ({"backbone": backbone} if backbone else {}), config)
    except BadSettings as error:
        raise click.ClickException(str(error)) from error
    configure_logs(settings.log_level, settings.log_format)
    try:
        app = create_app(settings)
        _refuse_open_door(settings, app.state.keys)
        listener = _listen(settings)
    except START_FAULTS as error:
        raise Refused(str(error), settings.log_format) from error
    server = DrainingServer(
        uvicorn.Config(
            direct(app),
            host=settings.host,
            port=settings.port,
            http=partial(BoundedReads, shed=app.state.shed),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here asks who the client is
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.grace_s,
        ),
        app.state.server,
    )
    _announce(app, settings, listener.getsockname()[1])
    # Some 100,000 objects of torch, pydantic and the app live as long as the process: a full
    # collection that walks them all holds every request up for 60 ms, several times a minute.
    gc.collect()
    gc.freeze()
    # At 700, the default, collections of young objects are an eighth of the event loop's time.
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
    server.run(sockets=[listener, *(listener.dup() for _ in range(ACCEPTS - 1))])
    if server.engine_lost:
        logging.shutdown()
        os._exit(ENGINE_LOST)  # a stuck thread can't be joined


class Refused(click.ClickException):
    """The server does not start: a sentence, or a log line where the logs are JSON."""

    def __init__(self, message: str, log_format: str) -> None:
        super().__init__(message)
        self.log_format = log_format

    def show(self, file: IO[Any] | None = None) -> None:
        if self.log_format == "json":
            log.error(self.format_message())
        else:
            super().show(file)


def _refuse_open_door(settings: Settings, keys: KeyRing) -> None:
    """Raises BadSettings for an address that others reach, without keys, unless told to."""
    try:
        loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        loopback = settings.host == "localhost"
    if not (loopback or keys.configured or settings.insecure):
        raise BadSettings(
            f"{settings.host} is not loopback and no API keys are configured: make one with "
            f"`trunkline keys --file {keys.path} new`, or give --insecure"
        )


def _listen(settings: Settings) -> socket.socket:
    """Raises BadSettings, with the address, where it can't be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host is called so
        number = error.errno if isinstance(error, OSError) else None
        why = os.strerror(number) if number and number > 0 else "no address has this name"
        raise BadSettings(
            f"can't listen on {settings.host}:{settings.port}: {why}; try another --host or --port"
        ) from error


class DrainingServer(uvicorn.Server):
    """A first SIGTERM or SIGINT begins to drain: /ready says so, uploads are refused, and after
    the drain window the listener closes and what is in flight is answered. A second ends it now."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.state = state
        self.engine_lost = False
        state.engine_lost = self._lose_engine

    def _lose_engine(self) -> None:
        """The waiting are answered, then the process ends with ENGINE_LOST."""
        self.engine_lost = self.state.draining = self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.state.draining:
            os._exit(128 + sig)  # what was acknowledged is on the disk
        if self.state.settings.drain_window_s == 0:
            self.state.draining = True
            self._end(sig, frame)
            return
        self.state.draining = True
        window = threading.Timer(self.state.settings.drain_window_s, self._end, (sig, frame))
        window.daemon = True
        window.start()

    def _end(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # raised again at the end, they would be the exit status


def _announce(app: FastAPI, settings: Settings, port: int) -> None:
    """What is served, where and in which dtype: as text, or as a log line where those are JSON."""
    state: ServerState = app.state.server
    names = [named.name for named in state.library.registry.page(limit=MAX_NAMES + 1)]
    url = f"http://{settings.host}:{port}"
    if settings.log_format == "json":
        # The address is a word of its own, as in the text: who started the server looks for it.
        sentence = f"trunkline {__version__} at {url} serves {state.backbone.id}"
        announce(sentence, {"url": url} | _facts(state, app.state.keys, names))
    else:
        _print_banner(state, app.state.keys, names, url)
    sys.stdout.flush()


def _facts(state: ServerState, keys: KeyRing, names: Sequence[str]) -> dict[str, Any]:
    return {
        "version": __version__,
        "backbone": state.backbone.id,
        "digest": state.backbone.digest,
        "dtype": state.dtype,
        "device": state.device,
        "operators": state.operators,
        "adapters": names[:MAX_NAMES],
        "adapter_count": state.library.registry.count(),
        "keys": str(keys.path) if keys.configured else None,
    }


def _print_banner(state: ServerState, keys: KeyRing, names: Sequence[str], url: str) -> None:
    """With a request to try."""
    count = state.library.registry.count()
    adapter = f'"adapter": "{names[0]}", ' if names else ""
    shown = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
    click.echo(
        f"trunkline {__version__}: {state.backbone.id}, {state.dtype} on {state.device} "
        f"({state.operators} operators), at {url}"
    )
    click.echo(f"{count} adapters: {shown}" if names else "no adapters yet: the backbone alone")
    key = ""
    if keys.configured:
        click.echo(f"API keys: {keys.path}")
        key = "-H 'authorization: Bearer KEY' "
    click.echo(
        f"try: curl -s {url}/critic {key}-H 'content-type: application/json' \\\n"
        f'       -d \'{{{adapter}"inputs": "To be, or not to be"}}\''
    )


serve = click.Command(
    "serve",
    callback=_serve,
    help=_serve.__doc__,
    params=[
        click.Argument(["backbone"], required=False, type=TrunkFolder()),
        click.Option(["--config"], type=click.Path(path_type=Path), help="A TOML file."),
        *(_flag(name) for name in Settings.model_fields if name not in NOT_FLAGS),
    ],
)
