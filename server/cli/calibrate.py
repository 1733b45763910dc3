"""trunkline calibrate: fit the table that turns a critic's sigmoid into a chance of being wrong."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from adapters.errors import Invalid
from adapters.format import AdapterSet, read_adapter, write_adapter
from adapters.staging import write_whole
from adapters.validate import validate
from adapters.weights import weights_of
from model.calibration import CriticSample, Judged, bucket_table, in_batches
from model.checkpoint import CALIBRATION_FILE, Backbone, read_backbone
from model.corpus import DataError, Row, sample_rows, tokens_of
from model.encoder import Encoder
from model.heads import CALIBRATION_BUCKETS, TrunkHeads
from model.metrics import expected_calibration_error
from model.precision import DTYPES, choose_dtype
from server.cli.training import sentences
from server.cli.trunk_folder import TrunkFolder

BASE = "base"
MAX_FILE_RANK = 1 << 20  # any rank will do in a file; the largest one served is a server's setting


@dataclass(frozen=True)
class Target:
    """Whose critic is calibrated: an adapter file's, or the trunk's own (adapter None)."""

    path: Path  # the adapter file, or the trunk's calibration.json
    adapter: AdapterSet | None


@click.command("calibrate")
@click.argument("trunk", type=TrunkFolder())
@click.argument("adapter")
@click.argument("text", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File to write. [default: ADAPTER itself, in place; of base TRUNK/calibration.json]",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Also write the table there as the training code does: an object from path to numbers.",
)
@click.option("--dry-run", is_flag=True, help="Report alone; ADAPTER stays as it is.")
@click.option(
    "--rows",
    default=4000,
    show_default=True,
    type=click.IntRange(min=2),
    help="Most rows of TEXT that are used, drawn at random.",
)
@click.option(
    "--mask-shares",
    type=(click.FloatRange(0, 1), click.FloatRange(0, 1)),
    default=(0.1, 0.6),
    show_default=True,
    help="Least and most of a row that is masked.",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--batch-tokens", default=4096, show_default=True, type=click.IntRange(min=1), help="At a time."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of torch. [default: one a core]")
def calibrate(
    trunk: Path,
    adapter: str,
    text: Path,
    out: Path | None,
    json_file: Path | None,
    dry_run: bool,
    rows: int,
    mask_shares: tuple[float, float],
    seed: int,
    batch_tokens: int,
    dtype: str,
    threads: int | None,
) -> None:
    """Calibrate the critic of ADAPTER on the trunk TRUNK with held-out TEXT.

    ADAPTER is an adapter file, the name of one in TRUNK/adapters, or `base` for the trunk's own
    critic. TEXT is a document a line, or JSONL with "text"; either may be .xz. It must be text that
    neither was trained on.

    Half of the rows fit the table of 100 buckets: their tokens are masked and filled by sampling,
    and the table gets the share of wrong tokens by bucket of the critic's sigmoid. The other half
    measures the calibration error before and after. The table is written into the adapter file,
    whose weights and metadata stay the same; its digest is a new one.
    """
    if mask_shares[0] > mask_shares[1]:
        raise click.BadParameter("--mask-shares: the first must not be above the second")
    if threads:
        torch.set_num_threads(threads)
    with sentences():
        backbone = read_backbone(trunk)
        target = _target(trunk, adapter)
        chosen = choose_dtype(dtype, torch.device("cpu"))
        sample = _sample(backbone, target, chosen, mask_shares, seed)
        fit, rest = _halves(text, rows, seed, backbone)
        fitted = _judge(sample, fit, batch_tokens, "fitting")
        table, filled = bucket_table(fitted.wrong, fitted.p)
        measured = _judge(sample, rest, batch_tokens, "measuring")
    tables = {"critic alone": None, "table before": _table_before(backbone, target)}
    tables |= {"new table": table}
    is_better = _report(fitted, measured, filled, (len(fit), len(rest)), tables)
    if not is_better and out is None and not dry_run:
        raise click.ClickException(
            f"the new table is no better than what was there, so {target.path} stays as it is: "
            "give more text, or --out FILE to have the table all the same"
        )
    with sentences():
        if json_file is not None:
            _add_to_json(json_file, adapter if target.adapter else BASE, table)
        if not dry_run:
            _write(target, out or target.path, table)


def _target(trunk: Path, adapter: str) -> Target:
    """Raises ValueError where there is no such adapter file, or it is not one."""
    if adapter == BASE:
        return Target(trunk / CALIBRATION_FILE, None)
    path = Path(adapter)
    if not path.is_file():
        path = trunk / "adapters" / f"{adapter}.safetensors"
    if not path.is_file():
        raise ValueError(f"{adapter} is neither an adapter file nor one of {trunk / 'adapters'}")
    try:
        return Target(path, read_adapter(path))
    except Invalid as error:
        raise ValueError(f"{path}: {error.message}") from error


def _sample(
    backbone: Backbone,
    target: Target,
    dtype: torch.dtype,
    mask_shares: tuple[float, float],
    seed: int,
) -> CriticSample:
    """Raises ValueError for an adapter that does not fit, or where there is no critic."""
    encoder, weights = Encoder(backbone.config, backbone.tensors, dtype), None
    critic = TrunkHeads.of(backbone.tensors, encoder.device).critic
    if target.adapter is not None:
        try:
            validate(target.adapter, backbone.config, backbone.digest, dtype, MAX_FILE_RANK)
        except Invalid as error:
            raise ValueError(f"{target.path}: {error.message}") from error
        weights = weights_of(
            target.adapter, backbone.config, dtype, lambda t, d: t.to(d).contiguous()
        )
        critic = critic if weights.critic is None else weights.critic
    if critic is None:
        raise ValueError("neither the trunk nor the adapter has a critic head to calibrate")
    return CriticSample(encoder, weights, critic, mask_shares, seed)


def _halves(
    text: Path, rows: int, seed: int, backbone: Backbone
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of ids to fit the table on, and others to measure it on. Raises DataError."""
    texts = sample_rows(text, "text", rows, seed)
    if len(texts) < 2:
        raise DataError(text, None, "one row alone leaves nothing to measure on")
    ids = [_ids(row, backbone) for row in texts]
    return ids[::2], ids[1::2]


def _ids(row: Row, backbone: Backbone) -> Tensor:
    """(T,), cut to block_size. Raises DataError for a text that can't be written in tokens."""
    limit = backbone.config.block_size
    return torch.tensor(tokens_of(row, "text", backbone.tokenizer, None).ids[:limit])


def _judge(sample: CriticSample, rows: Sequence[Tensor], batch_tokens: int, title: str) -> Judged:
    batches = list(in_batches(rows, batch_tokens))
    console = Console(stderr=True)
    shown = track(batches, title, console=console, disable=not sys.stderr.isatty(), transient=True)
    parts = [sample.judge(batch) for batch in shown]
    return Judged(torch.cat([part.wrong for part in parts]), torch.cat([part.p for part in parts]))


def _table_before(backbone: Backbone, target: Target) -> Tensor | None:
    """The table that is served now: the adapter's, else the trunk's."""
    own = target.adapter.tensors.get("calibration") if target.adapter else None
    return backbone.calibration if own is None else own.float()


def _report(
    fitted: Judged,
    measured: Judged,
    filled: int,
    rows: tuple[int, int],
    tables: Mapping[str, Tensor | None],
) -> bool:
    """Prints one error for each of `tables`, by its name, and returns whether the last is the best.

    The first is the critic without a table; another that is None does not exist.
    """
    share = float(fitted.wrong.double().mean())
    click.echo(
        f"fitted on {len(fitted.p):,} tokens of {rows[0]:,} rows, {share:.1%} of them wrong; "
        f"{filled} of {CALIBRATION_BUCKETS} buckets had tokens"
    )
    click.echo(f"calibration error (ECE) on {len(measured.p):,} tokens of {rows[1]:,} other rows:")
    errors = {}
    for number, (name, table) in enumerate(tables.items()):
        if number == 0 or table is not None:
            errors[name] = expected_calibration_error(measured.wrong, _mapped(measured.p, table))
            click.echo(f"  {name:<14}{errors[name]:.4f}")
    *before, after = errors.values()
    return after < min(before)


def _mapped(p: Tensor, table: Tensor | None) -> Tensor:
    if table is None:
        return p
    return table[(p * CALIBRATION_BUCKETS).long().clamp(0, CALIBRATION_BUCKETS - 1)]


def _add_to_json(path: Path, key: str, table: Tensor) -> None:
    """The table under `key`, beside what the file has. Raises ValueError for another file."""
    tables = {}
    if path.exists():
        try:
            tables = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON; it stays as it is") from error
        if not isinstance(tables, dict):
            raise ValueError(f"{path} is not an object from path to numbers; it stays as it is")
    text = json.dumps(tables | {key: table.tolist()}, indent=2, sort_keys=True) + "\n"
    write_whole(path, text.encode())
    click.echo(f"json:    {path}, under {key}")


def _write(target: Target, out: Path, table: Tensor) -> None:
    if target.adapter is None:
        write_whole(out, json.dumps(table.tolist()).encode() + b"\n")
        click.echo(f"written: {out}")
        return
    own = target.adapter
    write_adapter(
        out,
        {**own.tensors, "calibration": table},
        lora_alpha=own.lora_alpha,
        base_digest=own.metadata.get("base_digest"),
        metadata=own.metadata,
    )
    click.echo(f"written: {out}, {read_adapter(out).digest} (was {own.digest})")
