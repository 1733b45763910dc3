"""trunkline backup and trunkline restore."""

import os
from pathlib import Path

import click

from adapters.backup import Wanted, back_up
from adapters.backup_format import KEYS, KEYS_MARK, BackupRefused, Manifest
from adapters.errors import TrunklineError
from adapters.restore import restore as restore_backup
from adapters.restore import restore_keys
from server import __version__
from server.cli import tables
from server.keys import BadKeys, read_keys
from server.settings import default_data_dir


def _sum(manifest: Manifest) -> str:
    def count(what: str) -> int:
        return sum(each[what] for each in manifest.trunks.values())

    keys = f"with {KEYS}" if KEYS in manifest.files else f"without {KEYS}"
    counted = [tables.count(len(manifest.trunks), "trunk"), tables.count(count("names"), "adapter")]
    counted += [tables.count(count("versions"), "version"), tables.count(count("files"), "file")]
    return f"{', '.join(counted)} ({count('bytes')} bytes), {keys}"


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
        if not skip_damaged:
            read_keys(wanted.keys)  # a backup with a broken file would restore a broken one
        manifest = back_up(wanted, paths[-1])
    except (BackupRefused, BadKeys, TrunklineError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"backed up {_sum(manifest)}, to {paths[-1]}")
    for name in manifest.left_out:
        click.echo(f"left out, since it is damaged: {name}", err=True)
    if KEYS not in manifest.files:
        click.echo(f"{wanted.keys} is not there: {_without_keys(manifest)}", err=True)


@click.command()
@click.argument("source", metavar="BACKUP", type=click.Path(path_type=Path, exists=True))
@click.argument("data", metavar="DATA", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Move what DATA has aside; nothing is deleted.")
@click.option(
    "--only-keys",
    is_flag=True,
    help="Put back keys.json alone, and leave the adapters as they are; a server may run.",
)
def restore(source: Path, data: Path, replace: bool, only_keys: bool) -> None:
    """Restore BACKUP into the data folder DATA, with no server on it.

    Every digest is checked before anything is put in place.
    """
    if only_keys:
        _restore_keys(source, data)
        return
    try:
        manifest, aside = restore_backup(source, data, replace=replace)
    except BackupRefused as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"restored {_sum(manifest)}, of {manifest.created_at}, to {data}")
    if aside is not None:
        click.echo(f"what was there before is in {aside}")
        _warn_of_revoked(aside / KEYS, data / KEYS)
    if KEYS not in manifest.files:
        click.echo(f"the backup has no {KEYS}: {_without_keys(manifest)}", err=True)


def _restore_keys(source: Path, data: Path) -> None:
    try:
        aside = restore_keys(source, data)
    except BackupRefused as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"restored {data / KEYS}; the adapters are as they were")
    if aside is not None:
        click.echo(f"what was there before is in {aside}")
        _warn_of_revoked(aside, data / KEYS)


def _without_keys(manifest: Manifest) -> str:
    if KEYS_MARK in manifest.files:
        return (
            f"there were keys, as {KEYS_MARK} beside it shows, so a server on the restored folder "
            "does not start until it has keys again, or with --insecure"
        )
    return (
        "a server on the restored folder asks for no keys. Give --keys to `trunkline backup` where "
        "the server has its keys elsewhere"
    )


def _warn_of_revoked(before: Path, now: Path) -> None:
    """A backup has keys as live that were revoked after it was taken."""
    try:
        revoked = {key.id for key in read_keys(before) if key.revoked_at}
        live = {key.id for key in read_keys(now) if not key.revoked_at}
    except BadKeys:
        return
    for identity in sorted(revoked & live):
        click.echo(
            f"key {identity} was revoked after the backup and is live again: "
            f"`trunkline keys --file {now} revoke {identity}`",
            err=True,
        )


def _default_data() -> Path:
    """As the server's setting `data_dir` has it."""
    named = os.environ.get("TRUNKLINE_DATA_DIR")
    return Path(named) if named else default_data_dir()
