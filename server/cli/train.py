"""trunkline train: a trunk from text, and adapter sets on a frozen trunk."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from adapters.format import write_adapter
from model.batches import Example
from model.checkpoint import (
    Backbone,
    backbone_tensors,
    read_backbone,
    write_backbone,
)
from model.config import GPTConfig
from model.corpus import DataError, Row, read_rows
from model.gpt import GPT, HEADS
from model.masked import Masked
from model.metrics import calibration_table, expected_calibration_error
from model.objective import Objective
from model.objectives import OBJECTIVES, Classify, labels_of
from model.teacher import read_teacher
from model.tokenizer import Tokenizer
from model.train import CHECKPOINT_FILE
from model.vocabulary import SPECIAL_TOKENS, learn_vocabulary
from server.cli.training import (
    load_weights,
    prepare,
    run_training,
    sentences,
    sha256,
    training_options,
)
from server.cli.trunk_folder import TrunkFolder

TEST_MASK_SHARE = (0.15, 0.15)  # of the masked-token measures, BERT's


@click.group("train", context_settings={"show_default": True})
def train_() -> None:
    """Train a trunk, or an adapter set on a frozen trunk.

    The same command again goes on from the run folder's last checkpoint.
    """


@train_.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Backbone folder.")
@click.option("--vocab-size", default=8192)
@click.option("--block-size", default=1024)
@click.option("--n-layer", default=6)
@click.option("--n-head", default=6)
@click.option("--n-embd", default=384)
@click.option("--lora-rank", default=0, help="LoRA in the trunk's training; 0 is none.")
@click.option("--held-out", default=0.01, help="Share of rows, the last, kept for measuring.")
@click.option("--mask-shares", type=(float, float), default=(0.1, 0.6), help="Least and most.")
@click.option("--critic-alpha", default=0.5, help="Weight of the critic's loss.")
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    help="Safetensors of vectors: `rows`, one a row, for the pooled row; `wte`, to begin with.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Go on from this backbone's vocabulary and weights.",
)
@click.option("--teacher-weight", default=5.0, help="Of 1 - cosine to the teacher's vectors.")
@training_options(epochs=4.0, rate=1e-3)
def trunk(
    corpus: Path,
    out: Path,
    run: Path | None,
    vocab_size: int,
    held_out: float,
    mask_shares: tuple[float, float],
    critic_start: float,
    teacher: Path | None,
    teacher_weight: float,
    base: Path | None,
    **options: Any,
) -> None:
    """Train a trunk on CORPUS: a document a line, or JSONL with "text"; either may be .xz.

    Shared matrices, masked tokens and a critic. Without LoRA the trunk is made to work alone, as
    requests without an adapter meet it; with it, the LoRA becomes OUT/adapters/trunk.safetensors.
    """
    run = run or out.with_name(f"{out.name}.run")
    with sentences():
        rows = read_rows(corpus, Masked.fields)
        before = None if base is None else read_backbone(base)
        tokenizer = before.tokenizer if before else _tokenizer(run, rows, vocab_size)
        config = _trunk_config(tokenizer, options)
        prepare(options)
        gpt = GPT(config)
        if before is not None:
            load_weights(gpt, before)
        vectors = None if teacher is None else read_teacher(teacher, len(rows), gpt, before is None)
        weight = 0.0 if vectors is None else teacher_weight
        objective = Masked(gpt, mask_shares, critic_start, weight)
        examples = [objective.example(row, Masked.fields, tokenizer) for row in rows]
        if vectors is not None:
            examples = [replace(e, target=v) for e, v in zip(examples, vectors, strict=True)]
        count = max(1, round(held_out * len(rows)))
        fitted, kept = examples[:-count], examples[-count:]
        if not fitted:
            raise DataError(corpus, None, "one row alone leaves nothing to hold out")
        identity = {"data": sha256(corpus), "config": config.to_dict(), "held_out": count}
        identity |= {"vocab_size": vocab_size, "critic_start": critic_start}
        identity |= {"mask_shares": mask_shares, "teacher_weight": weight}
        identity |= {"teacher": None if teacher is None else sha256(teacher)}
        identity |= {"base": None if before is None else before.digest}
        run_training(objective, fitted, options, run, identity)
        _write_trunk(out, run, objective, kept, tokenizer)


def _trunk_config(tokenizer: Tokenizer, options: dict[str, Any]) -> GPTConfig:
    pad, mask, cls = (tokenizer.backend.token_to_id(token) for token in SPECIAL_TOKENS)
    shape = {name: options.pop(name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    rank = options.pop("lora_rank")
    return GPTConfig(
        **shape,
        vocab_size=tokenizer.vocab_size,
        pad_token_id=pad,
        mask_token_id=mask,
        cls_token_id=cls,
        add_critic_head=True,
        critic_alpha=options.pop("critic_alpha"),
        share_main_matrices=True,
        use_lora_attn=rank > 0,
        use_lora_mlp=rank > 0,
        lora_rank=rank or GPTConfig.lora_rank,
    )


def _tokenizer(run: Path, rows: Sequence[Row], vocab_size: int) -> Tokenizer:
    """The run's vocabulary: learnt at its start, the same once there is a checkpoint."""
    path = run / "tokenizer.json"
    if not (run / CHECKPOINT_FILE).exists():
        learnt = learn_vocabulary((row.text("text") for row in rows), vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".tmp")
        learnt.save(part)
        part.replace(path)
    return Tokenizer.from_file(path)


def _write_trunk(
    out: Path, run: Path, objective: Masked, kept: Sequence[Example], tokenizer: Tokenizer
) -> None:
    """Measure on held-out rows, calibrate the critic on half of them, and write the backbone."""
    objective.mask_shares = TEST_MASK_SHARE
    metrics = objective.evaluate(kept, 4096)
    wrong, p = objective.critic_sample(kept[::2], 4096)
    table = calibration_table(wrong, p)
    wrong, p = objective.critic_sample(kept[1::2] or kept, 4096)
    metrics["critic_ece"] = expected_calibration_error(wrong, p)
    buckets = (p * len(table)).long().clamp(max=len(table) - 1)
    metrics["critic_ece_calibrated"] = expected_calibration_error(wrong, table[buckets])
    gpt = objective.gpt
    tensors = {name: t.half() for name, t in backbone_tensors(gpt.config, gpt.state_dict()).items()}
    digest = write_backbone(out, gpt.config, tensors, tokenizer, table)
    (run / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    click.echo(f"backbone: {out}, {digest}")
    if gpt.config.use_lora_attn:
        path = out / "adapters" / "trunk.safetensors"
        lora = {n: t.half() for n, t in gpt.adapter_state_dict().items() if ".lora_" in n}
        write_adapter(path, lora, lora_alpha=gpt.config.lora_alpha, base_digest=digest)
        click.echo(f"adapter:  {path}")
    click.echo(json.dumps(metrics))


@train_.command()
@click.argument("base", type=TrunkFolder())
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Adapter file.")
@click.option("--objective", required=True, type=click.Choice(list(OBJECTIVES)))
@click.option("--fields", help="The rows' names for the objective's fields. [default: its own]")
@click.option("--test", type=click.Path(path_type=Path), help="Held-out rows, for the metrics.")
@click.option("--rank", default=8)
@click.option("--alpha", default=16.0)
@click.option("--dropout", default=0.05, help="Of LoRA.")
@click.option("--description", help="Goes into the file.")
@click.option("--license", help="Goes into the file.")
@training_options(epochs=3.0, rate=2e-3)
def adapter(
    base: Path,
    data: Path,
    out: Path,
    objective: str,
    fields: str | None,
    test: Path | None,
    run: Path | None,
    description: str | None,
    license: str | None,
    **options: Any,
) -> None:
    """Train an adapter set for DATA on the frozen trunk BASE: LoRA, LayerNorms, and a head.

    Objectives and their fields: masked (text), classify (text, label), score (text, score from 0 to
    1), pairs (left, right), tokens (text, spans of [start, end] offsets). --fields kjv,web reads
    `left` from kjv, `right` from web.
    """
    kind = OBJECTIVES[objective]
    names = fields.split(",") if fields else list(kind.fields)
    if len(names) != len(kind.fields):
        raise click.BadParameter(f"{objective} has the fields {', '.join(kind.fields)}")
    with sentences():
        backbone = read_backbone(base)
        rows, test_rows = read_rows(data, names), read_rows(test, names) if test else []
        task = _on_frozen_trunk(kind, backbone, rows, names, options)
        examples, held = (
            [task.example(row, names, backbone.tokenizer) for row in part]
            for part in (rows, test_rows)
        )
        identity = {
            "data": sha256(data),
            "config": task.gpt.config.to_dict(),
            "base": backbone.digest,
            "objective": objective,
            "fields": names,
        }
        loss = run_training(
            task, examples, options, run or out.with_name(f"{out.name}.run"), identity
        )
        metrics = {"train_loss": round(loss, 4)}
        if held:
            metrics |= task.evaluate(held, options["batch_tokens"])
        given = {"description": description, "license": license}
        metadata = {name: value for name, value in given.items() if value}
        _write_adapter(out, task, backbone, metrics, metadata)


def _on_frozen_trunk(
    kind: type[Objective],
    backbone: Backbone,
    rows: Sequence[Row],
    names: Sequence[str],
    options: dict[str, Any],
) -> Objective:
    """The objective on the trunk with new LoRA: all frozen but LoRA, LayerNorms and its head."""
    prepare(options)
    config = replace(
        backbone.config,
        use_lora_attn=True,
        use_lora_mlp=True,
        lora_rank=options.pop("rank"),
        lora_alpha=options.pop("alpha"),
        lora_dropout=options.pop("dropout"),
        add_critic_head=backbone.config.add_critic_head or "critic_head" in kind.heads,
    )
    gpt = GPT(config)
    load_weights(gpt, backbone)
    critic_start = options.pop("critic_start")
    if kind is Classify:
        task: Objective = Classify(gpt, labels_of(rows, names[1]))
    elif kind is Masked:
        task = Masked(gpt, critic_start=critic_start)
    else:
        task = kind(gpt)
    gpt.freeze_base(task.heads)
    return task


def _write_adapter(
    out: Path,
    task: Objective,
    backbone: Backbone,
    metrics: dict[str, float],
    metadata: dict[str, str],
) -> None:
    untrained = set(HEADS) - set(task.heads)  # the trunk's serve as well, or there are none
    tensors = {
        name: tensor
        for name, tensor in task.gpt.adapter_state_dict().items()
        if name.partition(".")[0] not in untrained
    }
    if isinstance(task, Classify):
        head = task.classifier.state_dict()
        tensors |= {f"classifier.{name}": tensor for name, tensor in head.items()}
        metadata["labels"] = json.dumps(task.labels)
    metadata["metrics"] = json.dumps(metrics)
    write_adapter(
        out,
        {name: tensor.half() for name, tensor in tensors.items()},
        lora_alpha=task.gpt.config.lora_alpha,
        base_digest=backbone.digest,
        metadata=metadata,
    )
    click.echo(f"adapter: {out}")
    click.echo(json.dumps(metrics))
