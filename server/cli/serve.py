"""trunkline serve."""

import gc
import logging
import os
import sys
import threading
import typing
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
from server.cli.banner import MAX_NAMES, facts, print_banner
from server.cli.listener import is_loopback, listen, removed_at_end, url_of
from server.cli.trunk_folder import TrunkFolder
from server.connection import BoundedReads
from server.descriptors import most_connections
from server.keys import BadKeys, KeyRing
from server.logs import announce, configure_logs
from server.open_connections import OpenConnections
from server.settings import BYTES, LISTS, BadSettings, Settings, load_settings, service_links
from server.state import ServerState

log = logging.getLogger("trunkline.serve")

ENGINE_LOST = 70  # exit status: the engine died or is stuck; start the server again
# Longer than clients and balancers keep an idle connection: who closes first risks the request that
# is on its way. uvicorn's 5 s are httpx's own.
KEEP_ALIVE_S = 75
# Connections accepted in a turn of the event loop, which accepts one a listener: behind 2,000 that
# send large bodies and leave, a new one waited for 24 s with one listener, for 3.5 s with these.
ACCEPTS = 8
YOUNG_OBJECTS = 10_000  # before they are looked through for cycles
START_FAULTS = (BadSettings, BadKeys, BackboneError, Int8Unavailable, TrunklineError)
AS_TEXT = {*BYTES, *LISTS, "fair_shares"}  # of the flags: with units, with commas, JSON
NOT_FLAGS = {"backbone"}  # an argument


def _flag(name: str) -> click.Option:
    """The flag of one settings field, under its own name, with its own help."""
    field = Settings.model_fields[name]
    default = "" if field.default in (None, "", [], {}) else f" [default: {field.default}]"
    short = ["--data"] if name == "data_dir" else []
    if name == "insecure":
        return click.Option(["--insecure"], is_flag=True, default=None, help=str(field.description))
    return click.Option(
        [f"--{name.replace('_', '-')}", *short, name],
        type=str if name in AS_TEXT else _flag_type(field.annotation),
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
    if links := service_links():
        log.info("passed over Kubernetes' service links: %s", ", ".join(links))
    try:
        app = create_app(settings)
        _refuse_open_door(settings, app.state.keys)
        listener = listen(settings)
    except START_FAULTS as error:
        raise Refused(str(error), settings.log_format) from error
    except Exception as error:
        log.debug("the start failed", exc_info=True)
        raise Refused(_unforeseen(error), settings.log_format) from error
    server = DrainingServer(
        uvicorn.Config(
            direct(app),
            host=settings.host,
            port=settings.port,
            http=partial(  # type: ignore[arg-type]
                BoundedReads,
                shed=app.state.shed,
                bound=OpenConnections(most_connections(), app.state.keys),
            ),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # server/proxies.py
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.grace_s,
        ),
        app.state.server,
    )
    _announce(app, settings, url_of(settings, listener))
    # Some 100,000 objects of torch, pydantic and the app live as long as the process: a full
    # collection that walks them all holds every request up for 60 ms, several times a minute.
    gc.collect()
    gc.freeze()
    # At 700, the default, collections of young objects are an eighth of the event loop's time.
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
    with removed_at_end(settings):
        server.run(sockets=[listener, *(listener.dup() for _ in range(ACCEPTS - 1))])
    if server.engine_lost:
        logging.shutdown()
        os._exit(ENGINE_LOST)  # a stuck thread can't be joined


def _unforeseen(error: Exception) -> str:
    """The sentence for a fault that was not foreseen: of a file, or a mistake of ours."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; the server needs it to start"
    text = " ".join(str(error).split())[:300]
    return (
        f"the server can't start: {type(error).__name__}: {text}; see whether a file that it names "
        "is whole, and with --log-level debug the log shows where it happened"
    )


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
    if not (is_loopback(settings) or keys.configured or settings.insecure):
        raise BadSettings(
            f"{settings.host} is not loopback and no API keys are configured: make one with "
            f"`trunkline keys --file {keys.path} new`, or give --insecure"
        )


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


def _announce(app: FastAPI, settings: Settings, url: str) -> None:
    """What is served, where and in which dtype: as text, or as a log line where those are JSON."""
    state: ServerState = app.state.server
    names = [named.name for named in state.library.registry.page(limit=MAX_NAMES + 1)]
    if settings.log_format == "json":
        # The address is a word of its own, as in the text: who started the server looks for it.
        sentence = f"trunkline {__version__} at {url} serves {state.backbone.id}"
        announce(sentence, {"url": url} | facts(state, app.state.keys, names))
    else:
        print_banner(state, app.state.keys, names, url)
    sys.stdout.flush()


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
