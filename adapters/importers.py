"""Training checkpoints in: a backbone folder and adapter files. Never at request time."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.format import write_adapter
from adapters.names import BASE, check_name
from model.checkpoint import (
    BackboneError,
    backbone_tensors,
    read_backbone,
    write_backbone,
)
from model.config import GPTConfig
from model.gpt import clean_training_state, is_adapter_tensor
from model.tokenizer import Tokenizer

SPECIAL_TOKENS = ("mask_token_id", "pad_token_id", "cls_token_id")
# Fields of model_args that belong to guidance, which the served model does not have.
_TRAINING_ONLY_ARGS = re.compile(r"use_guidance|plan_.*|guidance_.*")


# Fields in which the checkpoints of one trunk may differ: of training, and of the adapter itself.
_FREE_FIELDS = {
    "dropout",
    "ignore_index",
    "add_critic_head",
    "critic_alpha",
    "use_lora_attn",
    "use_lora_mlp",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
}


class ImportRefused(ValueError):
    """A checkpoint that can't become a backbone or an adapter set, and why."""


@dataclass(frozen=True)
class Imported:
    adapter: Path
    backbone: Path | None  # None where the folder was there already
    dropped: list[str]  # tensors the served model has no use for


@dataclass(frozen=True)
class Checkpoint:
    config: GPTConfig
    state: Mapping[str, Tensor]
    tokenizer: Tokenizer
    dropped: list[str]


def import_checkpoint(ckpt: Path, meta: Path, out: Path, name: str | None = None) -> Imported:
    """The first checkpoint of a trunk makes the folder `out`, each one an adapter file in it.

    Raises ImportRefused, with a sentence, before anything is written.
    """
    name = name or _name_of_stem(ckpt.stem)
    check_name(name)
    checkpoint = read_checkpoint(ckpt, meta)
    if not any(".lora_" in tensor for tensor in checkpoint.state):
        raise ImportRefused(f"{ckpt} has no LoRA tensors: there is no adapter set to import")
    try:
        tensors = backbone_tensors(checkpoint.config, checkpoint.state)
        if (out / "config.json").exists():
            return _add_adapter(checkpoint, tensors, out, name)
        return _new_backbone(checkpoint, tensors, out, name)
    except BackboneError as error:
        raise ImportRefused(f"{ckpt}: {error}") from error


def read_checkpoint(ckpt: Path, meta: Path) -> Checkpoint:
    """Read without running what is in the files. Raises ImportRefused."""
    saved = _load_weights(ckpt)
    if not {"model", "model_args"} <= set(saved):
        raise ImportRefused(f"{ckpt} is not a training checkpoint: it has no model and model_args")
    for part in ("model", "model_args"):
        if not isinstance(saved[part], Mapping):
            raise ImportRefused(f"{part} of {ckpt} is a {type(saved[part]).__name__}, no mapping")
    strange = [name for name, value in saved["model"].items() if not isinstance(value, Tensor)]
    if strange:
        raise ImportRefused(f"{strange[0]} of {ckpt} is not a tensor")
    state, dropped = clean_training_state(saved["model"])
    args = {k: v for k, v in saved["model_args"].items() if not _TRAINING_ONLY_ARGS.fullmatch(k)}
    if saved["model_args"].get("use_guidance"):
        raise ImportRefused(f"{ckpt} was trained with guidance, which this server can't apply")
    vocabulary = _load_meta(meta)
    for token in SPECIAL_TOKENS:
        if args.get(token) != vocabulary.get(token):
            raise ImportRefused(f"{meta} and {ckpt} disagree about {token}")
    try:
        config = GPTConfig.from_dict(args)
        tokenizer = _character_tokenizer(vocabulary)
    except ValueError as error:
        raise ImportRefused(f"{ckpt}: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise ImportRefused(f"{meta} has {tokenizer.vocab_size} tokens, {ckpt} {config.vocab_size}")
    return Checkpoint(config, state, tokenizer, dropped)


def _new_backbone(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], out: Path, name: str
) -> Imported:
    digest = write_backbone(out, checkpoint.config, tensors, checkpoint.tokenizer)
    lora = {n: t for n, t in checkpoint.state.items() if ".lora_" in n}
    return Imported(_write_adapter(checkpoint, lora, out, name, digest), out, checkpoint.dropped)


def _add_adapter(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], out: Path, name: str
) -> Imported:
    """Add a further checkpoint of the trunk in `out`: its LoRA, and what else differs from it."""
    backbone = read_backbone(out)
    if checkpoint.tokenizer.backend.get_vocab() != backbone.tokenizer.backend.get_vocab():
        raise ImportRefused(f"{out} has another vocabulary: this is not a checkpoint of its trunk")
    _demand_same_model(checkpoint.config, backbone.config, out)
    if set(backbone.tensors) - set(tensors):
        missing = sorted(set(backbone.tensors) - set(tensors))[0]
        raise ImportRefused(f"{out} has {missing}, and the checkpoint has not")
    carried = {n: t for n, t in checkpoint.state.items() if ".lora_" in n}
    for tensor_name, tensor in tensors.items():
        own = backbone.tensors.get(tensor_name)
        if own is not None and torch.equal(tensor, own):
            continue
        if not is_adapter_tensor(tensor_name):
            raise ImportRefused(
                f"{tensor_name} differs from that in {out}: this is another trunk, and an adapter "
                "can't carry it"
            )
        carried[tensor_name] = tensor
    _complete_norms(carried, tensors)
    path = _write_adapter(checkpoint, carried, out, name, backbone.digest)
    return Imported(path, None, checkpoint.dropped)


def _demand_same_model(config: GPTConfig, backbone: GPTConfig, out: Path) -> None:
    """Equal shapes are not enough: n_head, say, changes what the same tensors compute."""
    for name, value in backbone.to_dict().items():
        own = getattr(config, name)
        if name not in _FREE_FIELDS and own != value:
            raise ImportRefused(f"{name} is {value} in {out} and {own} in the checkpoint")


def _complete_norms(carried: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """A LayerNorm travels whole: where only its weight or only its bias differs, both go."""
    for norm in {name.rpartition(".")[0] for name in carried if ".ln_" in name}:
        for part in ("weight", "bias"):
            if f"{norm}.{part}" in tensors:
                carried[f"{norm}.{part}"] = tensors[f"{norm}.{part}"]


def _write_adapter(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], out: Path, name: str, base_digest: str
) -> Path:
    path = out / "adapters" / f"{name}.safetensors"
    alpha = checkpoint.config.lora_alpha
    write_adapter(path, tensors, lora_alpha=alpha, base_digest=base_digest)
    return path


def _name_of_stem(stem: str) -> str:
    """The stem as a valid adapter name: lower case, other characters as '-', 64 at most."""
    name = re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", stem.lower()).strip("._-")[:64] or "adapter"
    return f"{name}-adapter" if name == BASE else name


def _load_weights(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ImportRefused(f"{path} does not exist") from error
    except Exception as error:  # torch.load raises whatever its unpickler met
        asked = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(
            r"`?([\w.]+)`? was not an allowed", str(error)
        )
        if asked:
            raise ImportRefused(
                f"{path} asks for {asked[1]}; only plain tensors are read"
            ) from error
        raise ImportRefused(f"{path} is not a checkpoint of torch.save") from error
    if not isinstance(saved, dict):
        raise ImportRefused(f"{path} holds a {type(saved).__name__}, not a training checkpoint")
    return saved


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ImportRefused(f"asks for {module}.{name}; only plain values are read")


def _load_meta(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
    except FileNotFoundError as error:
        raise ImportRefused(f"{path} does not exist") from error
    except ImportRefused as error:
        raise ImportRefused(f"{path} {error}") from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise ImportRefused(f"{path} is not a pickle file") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("stoi"), dict):
        raise ImportRefused(f"{path} has no vocabulary stoi")
    return meta


def _character_tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    stoi: dict[str, int] = meta["stoi"]
    proper = all(isinstance(k, str) and type(v) is int for k, v in stoi.items())
    if not proper or sorted(stoi.values()) != list(range(len(stoi))):
        raise ValueError("stoi must map characters to the ids 0, 1, 2, ... without a gap")
    by_id = {number: entry for entry, number in stoi.items()}
    special = [by_id[meta[token]] for token in SPECIAL_TOKENS if meta.get(token) is not None]
    return Tokenizer.of_characters(stoi, special)
