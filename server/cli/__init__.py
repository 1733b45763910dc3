"""trunkline: the command line, one file a command."""

import click

from server import __version__
from server.cli.adapters import adapters
from server.cli.bench import bench
from server.cli.checkpoints import import_
from server.cli.keys import keys
from server.cli.serve import serve
from server.cli.train import train_


@click.group()
@click.version_option(__version__)
def main() -> None:
    """One resident trunk, thousands of adapters."""


for command in (serve, adapters, import_, train_, bench, keys):
    main.add_command(command)
