"""trunkline recover: go on without a backup, with what a data folder still has."""

from pathlib import Path

import click

from adapters import recovery
from adapters.errors import TrunklineError

LOSSES = (
    "versions, aliases and deletes of the missing rows are lost; numbers of lost versions may be "
    "given again"
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--accept-loss", is_flag=True, help="Do it: nothing is deleted, what is unknown is put away."
)
def recover(folder: Path, accept_loss: bool) -> None:
    """Show what is wrong with a data FOLDER, and have it served from what is left.

    Without --accept-loss nothing is changed. Prefer `trunkline restore` where there is a backup.
    """
    folders = recovery.trunk_folders(folder)
    if not folders:
        raise click.ClickException(f"{folder} has no trunk's folder with adapter files in it")
    try:
        unfit = [each for each in folders if not _is_fit(each)]
        if accept_loss:
            for each in unfit:
                _recover(each)
    except TrunklineError as error:
        raise click.ClickException(error.message) from error
    if unfit and not accept_loss:
        click.echo(
            f"`trunkline recover --accept-loss {folder}` renames a broken registry, begins one "
            f"with the rows that can be read, and puts unknown files into quarantine: {LOSSES}"
        )
        raise SystemExit(1)


def _is_fit(folder: Path) -> bool:
    found = recovery.examine(folder)
    for sentence in found.sentences():
        click.echo(sentence)
    return found.is_fit_to_serve


def _recover(folder: Path) -> None:
    for sentence in recovery.accept_loss(folder):
        click.echo(sentence)
    click.echo(f"{folder} can be served; {LOSSES}")
