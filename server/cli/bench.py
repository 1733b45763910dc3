"""trunkline bench."""

import tempfile
import typing
from dataclasses import replace
from pathlib import Path

import click

from loadtest.bench.oracle import Mismatch
from loadtest.bench.plan import QUICK, SHAPES, Plan, Sizes
from loadtest.bench.report import machine, versions
from loadtest.bench.run import SECTIONS, run
from model.precision import choose_device, choose_dtype
from server.cli.tables import console
from server.settings import Settings

DTYPES = typing.get_args(Settings.model_fields["dtype"].annotation)
FULL_ROUNDS = Sizes().rounds


def _sections(_: click.Context, __: click.Parameter, text: str | None) -> list[str]:
    names = list(SECTIONS) if text is None else text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(SECTIONS)}")
    return names


@click.command("bench")
@click.option("--quick", is_flag=True, help="About a minute: fewer and shorter rounds.")
@click.option("--sections", callback=_sections, help=f"Some of {','.join(SECTIONS)}.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="small", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="0 is one a core.")
@click.option(
    "--rounds", type=click.IntRange(1), help=f"Pairs of a ratio [default: {FULL_ROUNDS}]."
)
@click.option(
    "--minilm",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A sentence-transformers model folder to compare with.",
)
def bench(
    quick: bool,
    sections: list[str],
    shape: str,
    dtype: str,
    threads: int,
    rounds: int | None,
    minilm: Path | None,
) -> None:
    """Measure this machine: ratios of two things taken in turn, each checked before it is timed.

    Prints the machine, a table and, as the last line, JSON.
    """
    sizes = QUICK if quick else Sizes()
    if rounds is not None:
        sizes = replace(sizes, rounds=rounds, slow_rounds=rounds, starts=rounds)
    out = console()
    out.print(machine())
    out.print(", ".join(f"{name} {number}" for name, number in versions().items()))
    with tempfile.TemporaryDirectory(prefix="trunkline-bench-") as scratch:
        plan = Plan(
            shape,
            SHAPES[shape],
            dtype,
            choose_dtype(dtype, choose_device("cpu")),
            threads,
            sizes,
            Path(scratch),
            minilm,
        )
        try:
            report = run(plan, sections)
        except Mismatch as error:
            raise click.ClickException(str(error)) from error
    out.print(report.table())
    click.echo(report.line())
