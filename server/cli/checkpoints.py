"""trunkline import."""

from pathlib import Path

import click

from adapters.errors import TrunklineError
from adapters.importers import ImportRefused, import_checkpoint


@click.command("import")
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.option("--meta", required=True, type=click.Path(path_type=Path), help="Its meta.pkl.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Backbone folder.")
@click.option("--name", help="The adapter's name. [default: from CKPT's file name]")
def import_(ckpt: Path, meta: Path, out: Path, name: str | None) -> None:
    """Make a backbone folder and an adapter of a training checkpoint.

    Run again with a second checkpoint of the same trunk, it adds that one's adapter.
    """
    try:
        imported = import_checkpoint(ckpt, meta, out, name)
    except (ImportRefused, TrunklineError) as error:
        raise click.ClickException(str(error)) from error
    if imported.backbone:
        click.echo(f"backbone: {imported.backbone}")
    click.echo(f"adapter:  {imported.adapter}")
    if imported.dropped:
        click.echo(f"dropped, not used in serving: {', '.join(imported.dropped)}")
