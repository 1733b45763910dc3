"""trunkline serve."""

import sys
import typing
from pathlib import Path
from typing import Any, Literal

import click
import uvicorn
from fastapi import FastAPI

from adapters.errors import TrunklineError
from model.checkpoint import BackboneError
from server import __version__
from server.app import create_app
from server.logs import configure_logs
from server.settings import BadSettings, Settings, load_settings


def _flag(name: str) -> click.Option:
    """The flag of one settings field, under its own name, with its own help."""
    field = Settings.model_fields[name]
    default = "" if field.default is None else f" [default: {field.default}]"
    return click.Option(
        [f"--{name.replace('_', '-')}"],
        type=_flag_type(field.annotation),
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
        configure_logs(settings.log_level)
        app = create_app(settings)
    except (BadSettings, BackboneError, TrunklineError) as error:
        raise click.ClickException(str(error)) from error
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
        )
    )
    socket = server.config.bind_socket()
    _announce(app, settings, socket.getsockname()[1])
    server.run(sockets=[socket])


def _announce(app: FastAPI, settings: Settings, port: int) -> None:
    """What is served, where, in which dtype, and a request to try."""
    names = [version.name for version in app.state.registry]
    url = f"http://{settings.host}:{port}"
    adapter = f'"adapter": "{names[0]}", ' if names else ""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    click.echo(f"trunkline {__version__}: {app.state.backbone.id}, {app.state.placed}, at {url}")
    click.echo(f"{len(names)} adapters: {shown}" if names else "no adapters: the backbone alone")
    click.echo(
        f"try: curl -s {url}/critic -H 'content-type: application/json' \\\n"
        f'       -d \'{{{adapter}"inputs": "To be, or not to be"}}\''
    )
    sys.stdout.flush()


serve = click.Command(
    "serve",
    callback=_serve,
    help=_serve.__doc__,
    params=[
        click.Argument(["backbone"], required=False, type=click.Path(path_type=Path)),
        click.Option(["--config"], type=click.Path(path_type=Path), help="A TOML file."),
        *(_flag(name) for name in Settings.model_fields if name != "backbone"),
    ],
)
