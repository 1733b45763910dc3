"""trunkline import."""

from pathlib import Path
from typing import Any

import click
import torch

from adapters.errors import ImportRefused, TrunklineError
from adapters.importers import Imported, Options, import_checkpoint
from adapters.validate import MAX_RANK
from model.precision import choose_dtype

FILE = click.Path(path_type=Path)


@click.command("import")
@click.argument("ckpt", type=FILE)
@click.option(
    "--meta",
    type=FILE,
    help="The data set's meta.pkl. [default: what CKPT carries, else the one beside it]",
)
@click.option("--out", required=True, type=FILE, help="Backbone folder.")
@click.option("--name", help="The adapter's name. [default: from CKPT's file name]")
@click.option("--trunk-only", is_flag=True, help="Import the trunk without an adapter set.")
@click.option(
    "--ignore-key",
    "ignored_keys",
    multiple=True,
    metavar="NAME",
    help="Drop this unknown key of model_args. Repeatable.",
)
@click.option(
    "--calibration",
    type=FILE,
    help="The critic's calibration.json. [default: the one beside CKPT]",
)
@click.option("--no-calibration", is_flag=True, help="Take no calibration.json.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "int8"]),
    default="auto",
    envvar="TRUNKLINE_DTYPE",
    help="The dtype that will be served; the files are tried in it. [default: auto, as serve]",
)
@click.option(
    "--max-rank",
    type=click.IntRange(1),
    default=MAX_RANK,
    envvar="TRUNKLINE_MAX_RANK",
    help=f"Largest LoRA rank that will be served. [default: {MAX_RANK}]",
)
def import_(
    ckpt: Path, meta: Path | None, out: Path, name: str | None, dtype: str, **flags: Any
) -> None:
    """Make a backbone folder and an adapter of a training checkpoint.

    Run again with a second checkpoint of the same trunk, it adds that one's adapter. What it
    wrote can be served: every check of a server's start is made before anything is written.
    """
    options = Options(
        ignored_keys=frozenset(flags["ignored_keys"]),
        trunk_only=flags["trunk_only"],
        calibration=flags["calibration"],
        use_calibration=not flags["no_calibration"],
        dtype=choose_dtype(dtype, torch.device("cpu")),
        max_rank=flags["max_rank"],
    )
    try:
        imported = import_checkpoint(ckpt, meta, out, name, options)
    except (ImportRefused, TrunklineError) as error:
        raise click.ClickException(str(error)) from error
    _report(imported, out)


def _report(imported: Imported, out: Path) -> None:
    if imported.backbone:
        _say(f"backbone: {imported.backbone}")
    if imported.adapter:
        _say(f"adapter:  {imported.adapter}")
    for note in imported.notes:
        _say(note)
    if imported.dropped_args:
        _say(f"dropped from model_args: {', '.join(imported.dropped_args)}")
    if imported.dropped:
        _say(f"dropped, not used in serving: {', '.join(imported.dropped)}")
    if imported.backbone or imported.adapter:
        _say(f"serve it: trunkline serve {out}")


def _say(text: str) -> None:
    """It may hold names from the files, which may be no text that can be written."""
    click.echo(text.encode("utf-8", "backslashreplace").decode())
