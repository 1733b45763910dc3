"""What both training commands share: their options, the loop under its bar, their sentences."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from model.batches import Example
from model.checkpoint import Backbone, state_dict_of
from model.gpt import GPT
from model.objective import Objective
from model.precision import DTYPES, choose_dtype
from model.train import Settings, train
from server.cli.bar import training_bar


def training_options(epochs: float, rate: float) -> Callable[[Any], Any]:
    """The options that both commands have, with a command's own defaults."""
    options = (
        click.option("--epochs", default=epochs, help="May grow when a run goes on."),
        click.option("--batch-tokens", default=4096, help="Tokens in a batch, with padding."),
        click.option("--learning-rate", default=rate, help="At its peak."),
        click.option(
            "--muon", is_flag=True, help="Muon for the trunk's matrices, AdamW for the rest."
        ),
        click.option("--seed", default=0),
        click.option("--checkpoint-every", default=200, help="Steps."),
        click.option("--critic-start", default=0.5, help="Share of training before its critic."),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            help="Of the matrix products; auto: bfloat16 where the CPU has it natively.",
        ),
        click.option("--float32", is_flag=True, help="The same as --dtype float32."),
        click.option("--threads", type=int, help="Of torch. [default: one a core]"),
        click.option(
            "--run", type=click.Path(path_type=Path), help="Run folder. [default: OUT.run]"
        ),
    )

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def prepare(options: dict[str, Any]) -> None:
    threads = options.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(options["seed"])


def run_training(
    objective: Objective,
    examples: Sequence[Example],
    options: dict[str, Any],
    run: Path,
    identity: dict[str, Any],
) -> float:
    """Train with a bar, or say that there is nothing to do; returns the loss at the end."""
    dtype = _dtype(options)
    settings = Settings(
        epochs=options["epochs"],
        batch_tokens=options["batch_tokens"],
        learning_rate=options["learning_rate"],
        seed=options["seed"],
        muon=options["muon"],
        checkpoint_every=options["checkpoint_every"],
        bf16=dtype == torch.bfloat16,
    )
    with training_bar(_start_line(objective, examples, dtype)) as bar:
        outcome = train(objective, examples, settings, run, identity, bar.update)
    if not outcome.done:
        click.echo(
            f"{run} is finished, at step {outcome.step}: nothing is trained. "
            "More --epochs go on from there, another --run begins anew.",
            err=True,
        )
    return outcome.loss


def _dtype(options: dict[str, Any]) -> torch.dtype:
    """Raises click.BadParameter where --float32 and --dtype contradict each other."""
    name: str = options["dtype"]
    if options["float32"]:
        if name == "bfloat16":
            raise click.BadParameter("--float32 and --dtype bfloat16 contradict each other")
        name = "float32"
    return choose_dtype(name, torch.device("cpu"))


def _start_line(objective: Objective, examples: Sequence[Example], dtype: torch.dtype) -> str:
    """What is about to be trained, on how much, and how."""
    trained = {id(p): p.numel() for p in objective.parameters() if p.requires_grad}
    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    return (
        f"training {sum(trained.values()):,} parameters on {len(examples):,} examples in {name}, "
        f"{threads} thread{'s' * (threads > 1)}"
    )


@contextmanager
def sentences() -> Iterator[None]:
    """What is wrong with the data, the folders or the options ends the command as one sentence."""
    try:
        yield
    except ValueError as error:  # DataError, RunError, BackboneError, a config no model can have
        raise click.ClickException(str(error)) from error
    except OSError as error:  # a folder that can't be written, a disk that is full
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error


def load_weights(gpt: GPT, backbone: Backbone) -> None:
    """The backbone's weights into the model; LoRA and heads that it lacks stay as they are.

    A backbone without a CLS embedding of its own is served with wte's row, so training begins
    there. Raises ValueError for a model of another shape.
    """
    state = state_dict_of(backbone.config, backbone.tensors)
    if gpt.config.cls_token_id is not None:
        state.setdefault("cls_embedding", state["transformer.wte.weight"][gpt.config.cls_token_id])
    try:
        gpt.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the base is of another shape: {error}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
