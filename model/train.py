"""The training loop: steps, schedule, checkpoints. A run killed at any point goes on as if not.

All that is random in a step is drawn from a generator seeded by (seed, step), and the order of the
data is a function of (seed, epoch): a checkpoint needs the weights, the optimizer and the step.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.batches import Batch, Batches, Example
from model.config import MAIN_MATRICES
from model.gpt import GPT
from model.objective import Objective

CHECKPOINT_FILE = "checkpoint.pt"
LOG_FILE = "log.jsonl"
LAST_STEPS = 100
LEAST_RATE = 0.05  # of the learning rate: where the cosine ends


class RunError(ValueError):
    """A run folder holds another run's checkpoint, or the loss is not finite any more."""


@dataclass(frozen=True)
class Settings:
    """How a run trains. learning_rate is the peak; warmup the share of steps that climb to it."""

    epochs: float
    batch_tokens: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    seed: int = 0
    muon: bool = False  # for the blocks' matrices
    bf16: bool = True
    checkpoint_every: int = 200  # steps

    def identity(self) -> dict[str, Any]:
        """What a run may not change on the way; epochs may grow, the schedule then stretches."""
        fields = asdict(self)
        del fields["epochs"], fields["checkpoint_every"]
        return fields | {"betas": list(self.betas)}


@dataclass(frozen=True)
class Step:
    """One step done: its number from 1, of how many; loss and its parts; real tokens; seconds."""

    number: int
    steps: int
    loss: float
    parts: Mapping[str, float]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Of a run: the mean loss of its last LAST_STEPS, its step, and how many were done now."""

    loss: float
    step: int
    done: int


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear to the peak over warmup * steps, then a cosine down to LEAST_RATE of it."""
    climb = max(1, round(warmup * steps))
    if step <= climb:
        return peak * step / climb
    done = (step - climb) / max(1, steps - climb)
    return peak * (LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2)


class Optimizers:
    """AdamW, and Muon for the matrices that it is for: as one."""

    def __init__(self, objective: Objective, settings: Settings) -> None:
        """AdamW has the GPT's own groups, and one for the objective's head.

        Muon (Jordan et al. 2024) takes the blocks' main matrices, its steps scaled to AdamW's size
        (Liu et al. 2025, section 2.2), so that one learning rate serves both.
        """
        gpt = objective.gpt
        main = {id(gpt.get_parameter(name)): gpt.get_parameter(name) for name in _main(gpt)}
        matrices = [p for p in main.values() if p.requires_grad] if settings.muon else []
        for matrix in matrices:
            matrix.requires_grad_(False)  # not AdamW's
        adamw = gpt.configure_optimizers(
            settings.weight_decay, settings.learning_rate, settings.betas
        )
        for matrix in matrices:
            matrix.requires_grad_(True)
        ours = {id(p) for p in gpt.parameters()}
        head = [p for p in objective.parameters() if id(p) not in ours]
        if head:
            adamw.add_param_group({"params": head, "weight_decay": settings.weight_decay})
        self.all: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            muon = torch.optim.Muon(
                matrices,
                settings.learning_rate,
                settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self.all.append(muon)

    def step(self, rate: float) -> None:
        """A step at this learning rate, and the gradients away."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def _main(gpt: GPT) -> list[str]:
    layers = range(gpt.config.n_layer)
    return [f"transformer.h.{layer}.{path}.weight" for layer in layers for path in MAIN_MATRICES]


def train(
    objective: Objective,
    examples: Sequence[Example],
    settings: Settings,
    run: Path,
    identity: Mapping[str, Any],
    report: Callable[[Step], None],
) -> Outcome:
    """Train what of `objective` requires gradients, from the run folder's checkpoint if it has one.

    A run that is at its last step already, or beyond it, is left as it is.

    `identity` says what the run is of (data, shape): a checkpoint of another identity, or of other
    settings, is refused with RunError. The folder's log.jsonl gets a line a step.
    """
    batches = Batches(examples, settings.batch_tokens, settings.seed)
    steps = batches.steps(settings.epochs)
    optimizer = Optimizers(objective, settings)
    run.mkdir(parents=True, exist_ok=True)
    whole = dict(identity) | settings.identity()
    begun = _resume(objective, optimizer, run, whole)
    _cut_log(run / LOG_FILE, begun)
    objective.train()
    with (run / LOG_FILE).open("a", encoding="utf-8") as log:
        stream = batches.from_step(begun, steps, objective.gpt.config)
        for number, batch in enumerate(stream, begun + 1):
            step = _step(objective, optimizer, batch, settings, number, steps)
            log.write(json.dumps(asdict(step)) + "\n")
            if number % settings.checkpoint_every == 0 or number == steps:
                log.flush()
                _save(objective, optimizer, run, whole, number)
            report(step)
    return Outcome(_last_loss(run / LOG_FILE), max(begun, steps), max(0, steps - begun))


def _step(
    objective: Objective,
    optimizer: Optimizers,
    batch: Batch,
    settings: Settings,
    number: int,
    steps: int,
) -> Step:
    begin = time.perf_counter()
    torch.manual_seed(_seed_of(settings.seed, number))
    loss, parts = loss_of(objective, batch, number / steps, settings.bf16)
    if not torch.isfinite(loss):
        raise RunError(f"the loss of step {number} is {loss.item()}: try a lower learning rate")
    loss.backward()  # type: ignore[no-untyped-call]
    trained = [p for p in objective.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
    optimizer.step(learning_rate(number, steps, settings.learning_rate, settings.warmup))
    seconds = time.perf_counter() - begin
    return Step(number, steps, loss.item(), parts, batch.tokens, round(seconds, 4))


def loss_of(
    objective: Objective, batch: Batch, share: float, bf16: bool
) -> tuple[Tensor, dict[str, float]]:
    """objective.loss, under bfloat16 autocast where asked for."""
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=bf16):
        return objective.loss(batch, share)


def _seed_of(seed: int, step: int) -> int:
    raw = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(raw, "little") >> 1


def _save(
    objective: Objective,
    optimizer: Optimizers,
    run: Path,
    identity: Mapping[str, Any],
    step: int,
) -> None:
    """Write the checkpoint whole or not at all."""
    part = run / (CHECKPOINT_FILE + ".tmp")
    with part.open("wb") as file:
        state = {"step": step, "identity": json.dumps(identity, sort_keys=True)}
        state["objective"] = objective.state_dict()
        state["optimizer"] = optimizer.state_dict()
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, run / CHECKPOINT_FILE)


def _resume(
    objective: Objective,
    optimizer: Optimizers,
    run: Path,
    identity: Mapping[str, Any],
) -> int:
    """Load the folder's checkpoint, if any, and return its step. Raises RunError."""
    path = run / CHECKPOINT_FILE
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    before, now = json.loads(state["identity"]), json.loads(json.dumps(identity))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise RunError(
                f"{path} was begun with {_change(key, before.get(key), now.get(key))}: "
                "go on with the same, or choose another run folder (--run)"
            )
    objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _change(key: str, before: Any, now: Any) -> str:
    """The value before and the one now; of an object only the fields that differ."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{key} {before}, not {now}"
    fields = (field for field in before.keys() | now.keys() if before.get(field) != now.get(field))
    return ", ".join(
        f"{field} {before.get(field)}, not {now.get(field)}" for field in sorted(fields)
    )


def _last_loss(path: Path) -> float:
    lines = path.read_text("utf-8").splitlines()[-LAST_STEPS:]
    return sum(float(json.loads(line)["loss"]) for line in lines) / len(lines)


def _cut_log(path: Path, steps: int) -> None:
    """Keep the log's first lines, one a step: what came after the checkpoint is done again."""
    if not path.exists():
        return
    lines = path.read_text("utf-8").splitlines(keepends=True)[:steps]
    part = path.with_name(path.name + ".tmp")
    part.write_text("".join(lines), "utf-8")
    part.replace(path)
