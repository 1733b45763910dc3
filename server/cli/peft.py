"""trunkline adapters import-peft and export-peft: offline, between files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from adapters.errors import TrunklineError
from adapters.peft import export_peft, import_peft
from adapters.peft_config import PeftRefused
from model.checkpoint import BackboneError, read_backbone
from server.cli.tables import count
from server.cli.trunk_folder import TrunkFolder

_backbone = click.option(
    "--backbone", required=True, type=TrunkFolder(), help="The backbone's folder, or demo."
)


@click.command("import-peft")
@click.argument("folder", type=click.Path(path_type=Path))
@_backbone
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
def import_peft_(folder: Path, backbone: Path, out: Path) -> None:
    """Make an adapter file of the PEFT folder FOLDER. Needs no server.

    Takes LoRA on c_attn, c_proj and c_fc, with patterns of ranks and alphas and rsLoRA, and saved
    LayerNorms and critic head. What an adapter set can't express is refused by its name.
    """
    with _sentences():
        manifest = import_peft(folder, read_backbone(backbone), out)
    sites = count(sum(map(len, manifest.ranks.values())), "site")
    click.echo(f"adapter: {out}, {sites}, {count(len(manifest.norms), 'LayerNorm')}")


@click.command("export-peft")
@click.argument("file", type=click.Path(path_type=Path))
@_backbone
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def export_peft_(file: Path, backbone: Path, out: Path) -> None:
    """Make a PEFT folder of the adapter file FILE. Needs no server.

    peft.PeftModel.from_pretrained loads it onto model.gpt.GPT of the backbone.
    """
    with _sentences():
        dropped = export_peft(file, read_backbone(backbone), out)
    click.echo(f"PEFT folder: {out}")
    if dropped:
        click.echo(f"left out, PEFT has no place for it: {', '.join(dropped)}")


@contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except (PeftRefused, TrunklineError, BackboneError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error
