"""trunkline keys: make, list and revoke API keys."""

from pathlib import Path
from typing import Any

import click

from server.cli import tables
from server.key_patterns import warning_of
from server.keys import BadKeys, Key, Quota, new_key, read_keys, revoke_key
from server.settings import default_data_dir


@click.group()
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    envvar="TRUNKLINE_KEYS",
    help="The keys file; default: keys.json in the data folder.",
)
@click.option(
    "--data", type=click.Path(path_type=Path), envvar="TRUNKLINE_DATA_DIR", help="Data folder."
)
@click.pass_context
def keys(context: click.Context, file: Path | None, data: Path | None) -> None:
    """API keys; a running server sees a change within a second or two."""
    context.obj = file or (data or default_data_dir()) / "keys.json"


@keys.command()
@click.option("--name", default="", help="Whom it is for; stands in the audit trail.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=["infer"],
    show_default=True,
    type=click.Choice(["infer", "admin", "metrics"]),
    help="May be given again: an admin's key asks for answers only with infer too.",
)
@click.option("--adapters", multiple=True, help="Pattern of adapter names, as acme/*; default all.")
@click.option("--quota", help="Requests: 100/s, 6000/m or 50000/h.")
@click.option("--token-quota", help="Tokens: the same shapes.")
@click.pass_obj
def new(
    path: Path, /, name: str, quota: str | None, token_quota: str | None, **wishes: Any
) -> None:
    """Make a key and print it: once, it is stored nowhere.

    For a server on another data folder: trunkline keys --data DIR new.
    """
    try:
        _, secret = new_key(
            path,
            name,
            requests=Quota.parse(quota) if quota else None,
            tokens=Quota.parse(token_quota) if token_quota else None,
            **wishes,
        )
    except BadKeys as error:
        raise click.ClickException(str(error)) from error
    for warning in filter(None, map(warning_of, wishes["adapters"])):
        click.echo(f"warning: {warning}", err=True)
    click.echo(secret)
    click.echo(f"stored, hashed, in {path}", err=True)


@keys.command()
@click.pass_obj
def ls(path: Path) -> None:
    """List all keys, revoked ones too; never a secret."""
    try:
        rows = [_row(key) for key in read_keys(path)]
    except BadKeys as error:
        raise click.ClickException(str(error)) from error
    if not rows:
        click.echo(f"no keys in {path}")
        return
    columns = ("Id", "State", "Scopes", "Adapters", "Requests", "Tokens", "Name")
    right, fold = ("Requests", "Tokens"), ("Scopes", "Adapters", "Name")
    tables.console().print(tables.table(columns, rows, right=right, fold=fold))


def _row(key: Key) -> tuple[object, ...]:
    state = "revoked" if key.revoked_at else "live"
    scopes, adapters = ",".join(sorted(key.scopes)), ",".join(key.adapters) or "*"
    return key.id, state, scopes, adapters, key.requests or "-", key.tokens or "-", key.name


# Its first name, which scripts may have.
keys.add_command(click.Command("list", callback=ls.callback, help=ls.help, hidden=True))


@keys.command()
@click.argument("identity", metavar="ID")
@click.pass_obj
def revoke(path: Path, identity: str) -> None:
    """Revoke a key by its id, as `keys ls` shows it."""
    try:
        revoke_key(path, identity)
    except BadKeys as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"revoked {identity}")
