"""trunkline adapters push and pull: between the disk and a running server."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from adapters.names import check_name, parse_reference
from server.cli import tables
from server.cli.adapter_files import default_name, new_file, sendable, sha256_of
from server.cli.client import Answer, Server, on_server, path_of


def _pushed(answer: Answer) -> RenderableType:
    body = answer.body
    what = "is new" if answer.status == 201 else "was there already: the very same bytes"
    return (
        f"{body['name']}@{body['version']} {what}\n"
        f"  digest       {tables.digest(body['digest'])}, {decimal(body['bytes'])}\n"
        f"  changes      {tables.changes(body)}\n"
        f"  probe delta  {body['probe_delta']:.4g}{_converted(body)}"
    )


def _converted(body: dict[str, Any]) -> str:
    """A line of what was made of a PEFT folder."""
    made = body.get("converted")
    if made is None:
        return ""
    words = [f"LoRA on {tables.count(made['lora'], 'linear')}", f"alpha {made['lora_alpha']:g}"]
    words += [f"{made['folded']} alphas folded"] if made["folded"] else []
    words += [tables.count(made["ignored_files"], "file") + " ignored"] * bool(
        made["ignored_files"]
    )
    return f"\n  from PEFT    {', '.join(words)}"


@click.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path, exists=True))
@click.argument("name", required=False)
@click.option("--no-activate", is_flag=True, help="Store the version; what is current stays.")
@click.option("--if-match", type=click.IntRange(0), help="Only if this version is current.")
@click.option("--new", is_flag=True, help="Only if the name is not taken.")
@click.option("--allow-zero", is_flag=True, help="Take a set that changes nothing.")
@on_server(shown=_pushed)
def push(
    server: Server,
    path: Path,
    name: str | None,
    no_activate: bool,
    if_match: int | None,
    new: bool,
    allow_zero: bool,
) -> Answer:
    """Upload FILE as the new version of NAME.

    FILE is an adapter file, a PEFT folder, or such a folder as zip, tar or tar.gz, which the
    server converts. NAME defaults to FILE's own name. The version becomes the current one;
    requests under way keep theirs.
    """
    name = default_name(path) if name is None else name
    check_name(name)
    headers = {} if if_match is None else {"if-match": f'"{if_match}"'}
    headers |= {"if-none-match": "*"} if new else {}
    query = {"activate": not no_activate, "allow_zero": allow_zero}
    with sendable(path) as (file, kind):
        headers |= {"content-type": kind, "x-content-sha256": sha256_of(file)}
        with _progress() as progress, progress.open(file, "rb", description=name) as content:
            return server.call("PUT", path_of(name), params=query, headers=headers, content=content)


def _pulled(answer: Answer) -> RenderableType:
    body = answer.body
    size = decimal(body["bytes"])
    return f"{body['name']}@{body['version']} is in {body['file']}, {size}"


@click.command()
@click.argument("reference")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@on_server(shown=_pulled)
def pull(server: Server, reference: str, file: Path | None, force: bool) -> Answer:
    """Download the stored file of REFERENCE, byte for byte, to FILE.

    FILE defaults to the name with .safetensors. It is written whole, with its digest checked, or
    not at all.
    """
    name = parse_reference(reference).name
    path = Path(f"{name.rpartition('/')[2]}.safetensors") if file is None else file
    hashed, size = hashlib.sha256(), 0
    with new_file(path, force) as out:

        def write(part: bytes) -> None:
            nonlocal size
            size += len(part)
            hashed.update(part)
            out.write(part)

        headers = server.download(path_of(reference, "file"), write)
        declared = f"sha-256=:{base64.b64encode(hashed.digest()).decode()}:"
        if headers.get("content-digest") != declared:
            raise click.ClickException("the bytes are not those of the digest; nothing was written")
    # Not the ETag, which a proxy may have made a weak one
    version = int(headers["x-trunkline-adapter"].rpartition("@")[2])
    facts = {"name": name, "version": version, "digest": f"sha256:{hashed.hexdigest()}"}
    return Answer(200, facts | {"bytes": size, "file": str(path)})


def _progress() -> Progress:
    """On stderr, and only on a terminal; it goes when the answer is there."""
    console = tables.console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
