"""A training run's checkpoint and vocabulary, as the model that they are."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.errors import ImportRefused
from adapters.model_args import served_fields
from adapters.pickles import load_checkpoint, load_meta
from model.checkpoint import (
    STORED_DTYPES,
    optional_shapes,
    required_shapes,
    with_sharing_of,
)
from model.config import LORA_SITES, GPTConfig
from model.gpt import clean_training_state
from model.tokenizer import Tokenizer

SPECIAL_TOKENS = {"mask_token_id": "[MASK]", "pad_token_id": "[PAD]", "cls_token_id": "[CLS]"}
_OWN_META = "the checkpoint's own config"  # train.py keeps the data set's meta in the checkpoint
_BRACKETED = re.compile(r"\[[^\[\]]+\]|<[^<>]+>")  # [MASK], <pad>
_REASONS = (
    ("wpe.", "this server's model has rotary positions, not learned ones"),
    (".attn.bias", "this server's model has no causal mask"),
)


@dataclass(frozen=True)
class Checkpoint:
    config: GPTConfig  # with sharing as the tensors show it
    state: Mapping[str, Tensor]  # under its plain names, wte tied
    tokenizer: Tokenizer
    dropped: list[str]  # tensors that the served model has no use for
    dropped_args: list[str]  # keys of model_args that it does not have
    notes: list[str]  # what a person should know about it


def read_checkpoint(ckpt: Path, meta: Path | None, ignored: Collection[str] = ()) -> Checkpoint:
    """Read without running what is in the files; without `meta`, from the one that is clear.

    Raises ImportRefused, with a sentence that names the file and what to do.
    """
    saved = load_checkpoint(ckpt)
    args, state, dropped = _parts(saved, ckpt)
    vocabulary, source = _vocabulary(saved, ckpt, meta)
    try:
        fields, dropped_args = served_fields(args, ignored)
        fields = _with_meta(fields, vocabulary, source)
        config = GPTConfig.from_dict(fields | {"add_critic_head": "critic_head.weight" in state})
        _check_state(config, state, bool(fields.get("add_critic_head")))
        config = with_sharing_of(config, state)
        _check_lora(config, state)
        tokenizer = _tokenizer(vocabulary, config, source)
    except (ImportRefused, ValueError) as error:
        raise ImportRefused(f"{ckpt}: {error}") from error
    notes = [f"vocabulary: {source}"] if meta is None else []
    if tokenizer.vocab_size < config.vocab_size:
        notes.append(
            f"the trunk has {config.vocab_size} token ids and the vocabulary {tokenizer.vocab_size}"
            " entries: the ids behind them have no text"
        )
    return Checkpoint(config, state, tokenizer, dropped, dropped_args, notes)


def _parts(
    saved: Mapping[str, Any], ckpt: Path
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """model_args, the state under its plain names, and what was dropped from it."""
    if saved and all(isinstance(value, Tensor) for value in saved.values()):
        raise ImportRefused(
            f"{ckpt} holds tensors without model_args, so the model's shape is not known; what is "
            "imported is the whole checkpoint that train.py saves"
        )
    missing = [part for part in ("model", "model_args") if part not in saved]
    if missing:
        raise ImportRefused(
            f"{ckpt} is not a training checkpoint: it has no model and model_args "
            f"({' and '.join(missing)} missing), the dict that train.py saves"
        )
    for part in ("model", "model_args"):
        if not isinstance(saved[part], Mapping):
            kind = type(saved[part]).__name__
            raise ImportRefused(f"{part} of {ckpt} is of type {kind} and must be a dict")
    for name, value in saved["model"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ImportRefused(f"{name} of {ckpt} is not a tensor with a name")
    try:
        state, dropped = clean_training_state(saved["model"])
    except ValueError as error:
        raise ImportRefused(f"{ckpt}: {error}") from error
    if "transformer.wte.weight" not in state and "lm_head.weight" in state:
        state["transformer.wte.weight"] = state["lm_head.weight"]  # they are one tensor
    args = {
        key: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        for key, value in saved["model_args"].items()
    }
    return args, state, dropped


def _vocabulary(
    saved: Mapping[str, Any], ckpt: Path, meta: Path | None
) -> tuple[Mapping[str, Any], str]:
    """The data set's meta and where it is from: `meta`, else the checkpoint's own, else a file.

    Raises ImportRefused where a given meta is not the one that the checkpoint was trained with.
    """
    config = saved.get("config")
    own = config.get("meta") if isinstance(config, Mapping) else None
    has_own = isinstance(own, Mapping) and isinstance(own.get("stoi"), Mapping)
    if meta is None and has_own:
        assert own is not None
        return own, _OWN_META
    path = meta or _meta_beside(ckpt)
    vocabulary = load_meta(path)
    if has_own and own is not None and dict(own["stoi"]) != dict(vocabulary["stoi"]):
        raise ImportRefused(
            f"{path} is the meta of another data set: {ckpt} was trained with another vocabulary, "
            "which it carries itself; import it without --meta"
        )
    return vocabulary, str(path)


def _meta_beside(ckpt: Path) -> Path:
    """meta_X.pkl beside ckpt_X.pt, or the only meta*.pkl there. Raises ImportRefused."""
    own = ckpt.with_name(f"{ckpt.stem.replace('ckpt', 'meta', 1)}.pkl")
    if own != ckpt and own.is_file():
        return own
    found = sorted(ckpt.parent.glob("meta*.pkl"))
    if len(found) == 1:
        return found[0]
    several = f"there are {len(found)} meta files beside it" if found else "none is beside it"
    raise ImportRefused(
        f"{ckpt} does not carry its data set's vocabulary, and {several}: give it with "
        "--meta META.pkl"
    )


def _with_meta(
    fields: Mapping[str, Any], vocabulary: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """The fields, and for those that are absent the meta's. Raises ImportRefused if they differ."""
    merged = dict(fields)
    for token in SPECIAL_TOKENS:
        own, theirs = fields.get(token), vocabulary.get(token)
        absent_from_meta = theirs is None and token == "cls_token_id"  # train.py may set it
        if own is not None and own != theirs and not absent_from_meta:
            raise ImportRefused(
                f"the checkpoint and {source} disagree about {token}: {own} and {theirs}; the meta "
                "may be another data set's"
            )
        merged[token] = theirs if own is None else own
    for key in ("vocab_size", "block_size", "ignore_index"):
        if key not in merged and vocabulary.get(key) is not None:
            merged[key] = vocabulary[key]
    return merged


def _check_state(config: GPTConfig, state: Mapping[str, Tensor], claims_critic: bool) -> None:
    """Raises ImportRefused unless every tensor is one of this model's, of a served dtype, finite.

    Shapes are the backbone's and the adapter's own checks.
    """
    if not any(name.startswith(("transformer.wte", "transformer.h.0.attn.c_")) for name in state):
        raise ImportRefused(
            "there are no tensors of a trunk in it; an adapter set alone is imported with "
            "`trunkline adapters push`, as a safetensors file"
        )
    if config.n_layer > len(state):  # each layer has tensors of its own names
        raise ImportRefused(
            f"model_args have n_layer {config.n_layer}, and there are {len(state)} tensors"
        )
    known = _tensor_names(config)
    for name, tensor in state.items():
        if name not in known:
            why = next((f": {why}" for part, why in _REASONS if part in name), "")
            raise ImportRefused(f"{name} has no place in this model{why}")
        _check_values(name, tensor)
    if claims_critic and "critic_head.weight" not in state:
        raise ImportRefused("add_critic_head is set, and there is no critic_head.weight")


def _tensor_names(config: GPTConfig) -> set[str]:
    unshared = replace(config, share_main_matrices=False)
    lora = {
        f"transformer.h.{layer}.{site}.{matrix}.weight"
        for layer in range(config.n_layer)
        for site in LORA_SITES
        for matrix in "AB"
    }
    return {*required_shapes(unshared), *optional_shapes(config), "lm_head.weight", *lora}


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.dtype not in STORED_DTYPES:
        kind = f"{tensor.dtype}".removeprefix("torch.")
        raise ImportRefused(
            f"{name} is {kind}; tensors are taken in float32, float16 and bfloat16: convert it "
            "with .float() and save the checkpoint again"
        )
    if not torch.isfinite(tensor).all():
        raise ImportRefused(
            f"{name} has values that are not finite (NaN or Inf): the training had diverged, so "
            "take an earlier checkpoint"
        )


def _check_lora(config: GPTConfig, state: Mapping[str, Tensor]) -> None:
    """Raises ImportRefused where some layers have a site's LoRA and others lost theirs."""
    for site in LORA_SITES:
        paths = [f"transformer.h.{layer}.{site}" for layer in range(config.n_layer)]
        names = [f"{path}.{matrix}.weight" for path in paths for matrix in "AB"]
        missing = [name for name in names if name not in state]
        if 0 < len(missing) < len(names):
            raise ImportRefused(f"{missing[0]} is missing, and other LoRA of {site} is there")


def _tokenizer(vocabulary: Mapping[str, Any], config: GPTConfig, source: str) -> Tokenizer:
    """One id a character; bracketed entries and the special tokens' are special."""
    stoi = dict(vocabulary["stoi"])
    proper = all(isinstance(k, str) and type(v) is int for k, v in stoi.items())
    if not stoi or not proper or sorted(stoi.values()) != list(range(len(stoi))):
        raise ImportRefused(
            f"stoi of {source} must map characters to the ids 0, 1, 2, ... without a gap"
        )
    by_id = {number: entry for entry, number in stoi.items()}
    itos = vocabulary.get("itos")
    if isinstance(itos, Mapping) and dict(itos) != by_id:
        raise ImportRefused(f"stoi and itos of {source} disagree")
    _demand_size(len(stoi), vocabulary.get("vocab_size"), config, source)
    if config.cls_token_id == len(stoi):  # added by train.py to a data set that has none
        stoi[SPECIAL_TOKENS["cls_token_id"]] = len(stoi)
        by_id = {number: entry for entry, number in stoi.items()}
    ids = [getattr(config, token) for token in SPECIAL_TOKENS]
    special = {by_id[number] for number in ids if number in by_id}
    special |= {entry for entry in stoi if _BRACKETED.fullmatch(entry)}
    return Tokenizer.of_characters(stoi, sorted(special, key=stoi.__getitem__))


def _demand_size(entries: int, stated: Any, config: GPTConfig, source: str) -> None:
    if entries > config.vocab_size:
        raise ImportRefused(
            f"the vocabulary of {source} has {entries} entries, more than the model's vocab_size "
            f"{config.vocab_size}: it is another data set's"
        )
    if type(stated) is int and stated < entries:
        raise ImportRefused(
            f"{source} says vocab_size {stated}, and its stoi has {entries} entries"
        )
    cls_token_id = config.cls_token_id if config.cls_token_id is not None else -1
    if type(stated) is int and max(stated, cls_token_id + 1) != config.vocab_size:
        raise ImportRefused(
            f"{source} is of a vocabulary of {stated} and the model has {config.vocab_size}: it is "
            "another data set's"
        )
