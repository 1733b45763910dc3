"""model_args, as a training run leaves them: which keys the served model has, which it drops."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from adapters.errors import ImportRefused
from model.config import GPTConfig

FIELDS = {field.name for field in dataclasses.fields(GPTConfig)}

# Keys of the training scripts that change nothing in a forward pass of the trained model.
_TRAINING = re.compile(
    r"freeze_transformer|init_from(_checkpoint)?|unfreeze_.*|critic_target_scope"
    r"|(start|end)_(critic|sampler)_iteration|num_token_classes|binary_classification"
    r"|seq_scorer_.*|learning_rate|max_iters|weight_decay|beta[12]|grad_clip|decay_lr|warmup_iters"
    r"|lr_decay_iters|min_lr|gradient_accumulation_steps|batch_size|target_size|seed"
    r"|backend|device|dtype|compile|loss_modifiers_enabled|(entropy_modifier|target_smoothing)_.*"
    r"|mask_ratio_weight_.*|mask_probability|iter_num|best_val_loss|sampler_min_neighbors_ratio"
    r"|rotary_max_position_embeddings|reward_head_hidden_dim"
)
_LOGGING = re.compile(r"(wandb|eval|log)_.*|out_dir|always_save_checkpoint")
_DATA = re.compile(r"dataset(_name)?|training_type|data_.*|meta")
_GUIDANCE = re.compile(r"use_guidance|plan_.*|guidance_.*|cond_dropout_prob")

# Keys that choose the architecture, with the values of the one that is served.
_ARCHITECTURE: dict[str, tuple[Any, ...]] = {
    "use_guidance": (False,),
    "attention_type": ("bidirectional",),
    "position_encoding": ("rotary",),
    "use_rope": (True,),
    "use_rotary_embeddings": (True,),
    "rotary_base": (10000,),
    "embedding_mode": ("standard",),
    "model_type": ("diffusion",),
    "mode": ("language_model", "sequence_scorer"),
    "model_mode": ("language_model", "sequence_scorer"),
}
_WHY = {
    "use_guidance": "the model was trained with a plan encoder, which this server does not have",
    "attention_type": "this server's attention is bidirectional",
}


def served_fields(
    args: Mapping[str, Any], ignored: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The fields of GPTConfig that model_args give, and the keys that were dropped.

    A key with None counts as absent. Raises ImportRefused for a value of another architecture, for
    an unknown key that is set and not ignored, and for an ignored key that is not there.
    """
    strange = sorted(set(ignored) - set(map(str, args)))
    if strange:
        raise ImportRefused(f"--ignore-key {strange[0]}: model_args have no such key")
    for key, values in _ARCHITECTURE.items():
        value = args.get(key)
        if value is not None and not (
            isinstance(value, (bool, int, float, str)) and value in values
        ):
            why = _WHY.get(key, f"this server's model has {key} {values[0]}")
            raise ImportRefused(f"model_args have {key} {str(value)[:60]}, and {why}")
    unknown = [str(key) for key, value in args.items() if _refuses(str(key), value, ignored)]
    if unknown:
        options = " ".join(f"--ignore-key {key}" for key in sorted(unknown))
        raise ImportRefused(
            f"model_args have keys that this server does not know: {', '.join(map(repr, unknown))}"
            f"; if they change nothing in the model, import with {options}"
        )
    fields = {key: value for key, value in args.items() if key in FIELDS and value is not None}
    return fields, sorted(str(key) for key in args if key not in FIELDS)


def _refuses(key: str, value: Any, ignored: Collection[str]) -> bool:
    known = key in FIELDS or key in _ARCHITECTURE or key in ignored
    patterns = (_TRAINING, _LOGGING, _DATA, _GUIDANCE)
    return not (known or _is_empty(value) or any(p.fullmatch(key) for p in patterns))


def _is_empty(value: Any) -> bool:
    """None, False, 0, or an empty text or collection: a feature that is off."""
    plain = isinstance(value, (bool, int, float, str, list, tuple, dict, set))
    return value is None or (plain and not value)
