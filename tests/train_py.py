"""Checkpoints in the form in which the training script leaves them, of tiny random models."""

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from conftest import CHARACTERS, SPECIAL, TINY, random_gpt

from model.config import GPTConfig
from model.gpt import GPT

Saved = dict[str, Any]

# What stands in model_args beside the model's own fields, with values as they are left there.
TRAINING_ARGS = {
    "use_guidance": False,
    "plan_tokens": 16,
    "plan_encoder_depth_factor": 0.5,
    "cond_dropout_prob": 0.1,
    "freeze_transformer": False,
    "init_from_checkpoint": None,
    "unfreeze_at_iteration": None,
    "unfreeze_lr_multiplier": 0.1,
    "critic_target_scope": "masked_and_ignore",
    "start_critic_iteration": 2000,
    "end_critic_iteration": 8000,
}


def meta_of(config: GPTConfig) -> dict[str, Any]:
    """The data set's meta; special tokens are in the vocabulary where the config has them."""
    special = [name for name in SPECIAL if getattr(config, f"{name[1:-1].lower()}_token_id")]
    stoi = {c: i for i, c in enumerate([*CHARACTERS, *special])}
    return {
        "dataset_name": "char_diffusion",
        "training_type": "MLM",
        "vocab_size": len(stoi),
        "stoi": stoi,
        "itos": {i: c for c, i in stoi.items()},
        "block_size": config.block_size,
        "ignore_index": -100,
    } | {f"{name[1:-1].lower()}_token_id": stoi[name] for name in special}


@lru_cache
def _gpt(config: GPTConfig, seed: int) -> GPT:
    return random_gpt(config, seed)


def saved_by_train_py(config: GPTConfig = TINY, seed: int = 0) -> Saved:
    """Model, optimizer, model_args, config and counters, as train.py saves them."""
    state = {name: tensor.clone() for name, tensor in _gpt(config, seed).state_dict().items()}
    if config.cls_token_id is None:  # the sequence head is always there
        state["sequence_head.base_predictor.weight"] = torch.randn(1, config.n_embd)
        state |= {"sequence_head.A": torch.ones(1), "sequence_head.B": torch.zeros(1)}
    state["sequence_head.temperature"] = torch.zeros(1)
    own = dataclasses.asdict(config)
    args = {key: value for key, value in own.items() if key not in ("pooling", "ignore_index")}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}
    return {
        "model": state,
        "optimizer": optimizer,
        "model_args": args | TRAINING_ARGS,
        "iter_num": 10,
        "best_val_loss": torch.tensor(3.9),
        "config": {"dataset": "char_diffusion", "compile": False, "meta": meta_of(config)},
    }


def write(path: Path, saved: object, old_format: bool = False) -> Path:
    torch.save(saved, path, _use_new_zipfile_serialization=not old_format)
    return path
