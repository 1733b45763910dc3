"""trunkline encode, critic, classify: requests to a server, from arguments or from stdin."""

import base64
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from adapters.names import BASE, parse_reference
from server.cli import results
from server.cli.adapter_files import new_file
from server.cli.client import Answer, Server, on_server

OUTPUTS = ("embedding", "tokens", "critic", "logits", "labels")


@dataclass(frozen=True)
class Asked(Answer):
    """An answer, with the texts that it is for: inputs outermost, then adapters."""

    texts: Sequence[str]

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(text, row) of each row of the answer."""
        data = self.body["data"]
        adapters = max(1, len(data) // max(1, len(self.texts)))
        return [(self.texts[index // adapters], row) for index, row in enumerate(data)]


def _texts(_: click.Context, __: click.Parameter, words: tuple[str, ...]) -> list[str]:
    """The arguments, `-` replaced by the lines of stdin that are not empty."""
    texts: list[str] = []
    for text in words:
        lines = sys.stdin.read().splitlines() if text == "-" else [text]
        texts += [line for line in lines if line.strip()] if text == "-" else lines
    if not texts:
        raise click.BadParameter("there is no text: give one, or - to read lines from stdin")
    return texts


Command = Callable[..., Any]


def _inputs(function: Command) -> Command:
    """The arguments of every command here: TEXT... and --adapter."""
    for add in (
        click.option("--truncate", is_flag=True, help="Cut what is too long for the trunk."),
        click.option(
            "--adapter",
            "references",
            multiple=True,
            metavar="REFERENCE",
            help="An adapter; given again, every text is asked for under each. Default: the "
            "backbone alone.",
        ),
        click.argument("texts", nargs=-1, callback=_texts, metavar="TEXT...", required=True),
    ):
        function = add(function)
    return function


def _ask(
    server: Server,
    path: str,
    texts: Sequence[str],
    references: Sequence[str],
    truncate: bool,
    **more: Any,
) -> Asked:
    for reference in references:
        if reference != BASE:
            parse_reference(reference)
    body: dict[str, Any] = {"inputs": list(texts)} | ({"truncate": True} if truncate else {})
    if references:
        many = len(references) > 1
        body |= {"adapters": list(references)} if many else {"adapter": references[0]}
    body |= {key: value for key, value in more.items() if value is not None}
    answer = server.call("POST", path, json=body)
    return Asked(answer.status, answer.body, texts)


def _has_errors(answer: Answer) -> bool:
    return any("error" in row for row in answer.body["data"])


@click.command()
@_inputs
@click.option(
    "--output",
    "outputs",
    multiple=True,
    type=click.Choice(OUTPUTS),
    default=["embedding"],
    show_default=True,
    help="May be given again: all come out of one forward pass.",
)
@click.option("--pooling", type=click.Choice(("mean", "cls", "last")))
@click.option("--dimensions", type=click.IntRange(1), help="Keep the first n, then normalise.")
@click.option(
    "--npy",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the embeddings to this NumPy file, (rows, dimensions) float32.",
)
@on_server(shown=lambda answer: results.encoded(answer.rows()), fails=_has_errors)
def encode(
    server: Server,
    texts: list[str],
    references: tuple[str, ...],
    truncate: bool,
    outputs: tuple[str, ...],
    pooling: str | None,
    dimensions: int | None,
    npy: Path | None,
) -> Answer:
    """Encode TEXT... on a running server.

    TEXT may be - for the lines of stdin. With --json the embeddings are printed whole.
    """
    if npy is not None and "embedding" not in outputs:
        raise click.BadOptionUsage("npy", "--npy needs --output embedding")
    answer = _ask(
        server,
        "/encode",
        texts,
        references,
        truncate,
        outputs=list(outputs),
        pooling=pooling,
        dimensions=dimensions,
        encoding_format=None if npy is None else "base64",
    )
    if npy is not None:
        _write_npy(npy, answer)
    return answer


def _write_npy(path: Path, answer: Answer) -> None:
    """The rows' embeddings, base64 of little-endian float32, as one matrix; whole or not at all."""
    import numpy as np  # noqa: PLC0415 -- only here, the other commands start without it

    if _has_errors(answer):
        raise click.ClickException("a row has an error, so no file was written: see --json")
    rows = [base64.b64decode(row["embedding"]) for row in answer.body["data"]]
    matrix = np.stack([np.frombuffer(row, "<f4") for row in rows])
    with new_file(path, force=True) as file:
        np.save(file, matrix)
    click.echo(f"{path}: {len(matrix)} rows of {matrix.shape[1]} float32 numbers", err=True)


@dataclass(frozen=True)
class Judged(Asked):
    threshold: float


@click.command()
@_inputs
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Tokens at least this likely to be wrong are marked.",
)
@on_server(shown=lambda answer: results.judged(answer.rows(), answer.threshold), fails=_has_errors)
def critic(
    server: Server,
    texts: list[str],
    references: tuple[str, ...],
    truncate: bool,
    threshold: float,
) -> Answer:
    """Say how likely each token of TEXT... is wrong, on a running server.

    TEXT may be - for the lines of stdin. On a terminal the doubtful tokens are coloured; elsewhere
    they are listed.
    """
    answer = _ask(server, "/critic", texts, references, truncate)
    return Judged(answer.status, answer.body, texts, threshold)


@click.command()
@_inputs
@click.option("--top-k", type=click.IntRange(1), default=3, show_default=True, help="Labels a row.")
@on_server(shown=lambda answer: results.classified(answer.rows()), fails=_has_errors)
def classify(
    server: Server, texts: list[str], references: tuple[str, ...], truncate: bool, top_k: int
) -> Answer:
    """Classify TEXT... under an adapter with a classifier, on a running server.

    TEXT may be - for the lines of stdin.
    """
    return _ask(server, "/classify", texts, references, truncate, top_k=top_k)
