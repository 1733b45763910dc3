"""trunkline backup and trunkline restore."""

import os
from pathlib import Path

import click

from adapters.backup import Wanted, back_up
from adapters.backup_format import KEYS, BackupRefused, Manifest
from adapters.errors import TrunklineError
from adapters.restore import restore as restore_backup
from server import __version__
from server.settings import default_data_dir


def _sum(manifest: Manifest) -> str:
    def count(what: str) -> int:
        return sum(each[what] for each in manifest.trunks.values())

    keys = f"with {KEYS}" if KEYS in manifest.files else f"without {KEYS}"
    return (
        f"{len(manifest.trunks)} trunks, {count('names')} adapters, {count('versions')} versions, "
        f"{count('files')} files ({count('bytes')} bytes), {keys}"
    )


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="[DATA] OUT", type=Path)
@click.option(
    "--keys",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    envvar="TRUNKLINE_KEYS",
    help="The server's keys file; default: keys.json in the data folder.",
)
@click.option("--trunk", help="One folder of DATA; default: all of them.")
@click.option(
    "--skip-damaged", is_flag=True, help="Leave damaged adapter files out, and list them."
)
def backup(
    paths: tuple[Path, ...], keys: Path | None, trunk: str | None, skip_damaged: bool
) -> None:
    """Back up the data folder DATA to OUT, while the server runs or not.

    OUT is a new folder, or a new tar file where its name ends in .tar. DATA is TRUNKLINE_DATA_DIR,
    or the default data folder, unless given.
    """
    if len(paths) > 2:
        raise click.UsageError("give [DATA] OUT, no more")
    data = paths[0] if len(paths) == 2 else _default_data()
    wanted = Wanted(data, keys or data / KEYS, __version__, trunk, skip_damaged)
    try:
        manifest = back_up(wanted, paths[-1])
    except (BackupRefused, TrunklineError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"backed up {_sum(manifest)}, to {paths[-1]}")
    for name in manifest.left_out:
        click.echo(f"left out, since it is damaged: {name}", err=True)
    if KEYS not in manifest.files:
        click.echo(
            f"{wanted.keys} is not there: a server on the restored folder asks for no keys. Give "
            "--keys where the server has its keys elsewhere",
            err=True,
        )


@click.command()
@click.argument("source", metavar="BACKUP", type=click.Path(path_type=Path, exists=True))
@click.argument("data", metavar="DATA", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Move what DATA has aside; nothing is deleted.")
def restore(source: Path, data: Path, replace: bool) -> None:
    """Restore BACKUP into the data folder DATA, with no server on it.

    Every digest is checked before anything is put in place.
    """
    try:
        manifest, aside = restore_backup(source, data, replace=replace)
    except BackupRefused as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"restored {_sum(manifest)}, of {manifest.created_at}, to {data}")
    if aside is not None:
        click.echo(f"what was there before is in {aside}")
    if KEYS not in manifest.files:
        click.echo("the backup has no keys: a server on this folder asks for none", err=True)


def _default_data() -> Path:
    """As the server's setting `data_dir` has it."""
    named = os.environ.get("TRUNKLINE_DATA_DIR")
    return Path(named) if named else default_data_dir()
