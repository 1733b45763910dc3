"""PEFT folders in and out: adapter_config.json and adapter_model.safetensors, without peft itself.

PEFT knows an alpha for each module, an adapter file one for all. The file gets the alpha that most
sites have; a site with another one gets B * (its alpha / the file's), taken in float64 and rounded
once to float32, so that scaling * B is the same. The way out needs no such thing: ranks that
differ go into rank_pattern, and PEFT's scaling follows from them as this format's does.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.format import AdapterSet, adapter_bytes, read_adapter, write_adapter
from adapters.validate import Manifest, validate
from model.checkpoint import Backbone

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

# the linear that PEFT wraps -> the site where the same LoRA is added here
SITES = {
    "attn.c_attn": "attn.lora_qkv",
    "attn.c_proj": "attn.lora_out",
    "mlp.c_fc": "mlp.lora_fc",
    "mlp.c_proj": "mlp.lora_proj",
}

_PREFIX = "base_model.model."
_LORA = re.compile(
    rf"(transformer\.h\.[0-9]+\.)({'|'.join(map(re.escape, SITES))})\.lora_([AB])\.weight"
)
_SAVED = re.compile(r"transformer\.(h\.[0-9]+\.ln_[12]|ln_f)\.(weight|bias)|critic_head\.weight")
_LORA_OUT = re.compile(r"(transformer\.h\.[0-9]+\.)([a-z]+\.lora_[a-z]+)\.([AB])\.weight")

# Fields of adapter_config.json that say nothing about what the trained tensors do, or say it of
# modules that the tensors' names show.
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
    "use_rslora",
}  # fmt: skip
# Others, PiSSA and its kind, change the backbone's matrices when they begin.
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")
_DESCRIBING = ("created_at", "description", "license", "metrics")  # metadata that travels along


class PeftRefused(ValueError):
    """A PEFT folder, or an adapter file, that can't be said in the other's terms, and why."""


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says of the scaling."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]  # regular expressions of module names, the first match counts
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.r)

    def alpha(self, module: str) -> float:
        return self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.lora_alpha)


def import_peft(folder: Path, backbone: Backbone, out: Path) -> Manifest:
    """Make the adapter file `out` of a PEFT folder; what it changes.

    Raises PeftRefused for what an adapter set can't express, Invalid for tensors that do not fit
    the backbone; then nothing is written.
    """
    config = _read_config(folder / CONFIG_FILE)
    saved = _read_tensors(folder / TENSOR_FILE)
    tensors = {_name_here(name): tensor for name, tensor in saved.tensors.items()}
    alpha = _fold_alphas(config, tensors)
    metadata = {key: saved.metadata[key] for key in _DESCRIBING if key in saved.metadata}
    metadata |= {"use_rslora": "true"} if config.use_rslora else {}
    base_digest = saved.metadata.get("base_digest", backbone.digest)
    described = metadata | {"lora_alpha": repr(alpha), "base_digest": base_digest}
    manifest = _validated(AdapterSet(tensors, described, ""), backbone)
    write_adapter(out, tensors, lora_alpha=alpha, base_digest=base_digest, metadata=metadata)
    return manifest


def export_peft(file: Path, backbone: Backbone, out: Path) -> list[str]:
    """Make the PEFT folder `out` of an adapter file, for model.gpt.GPT of the backbone.

    Returns the names of the tensors that PEFT has no place for: calibration, classifier, sequence
    head, CLS embedding, and the critic head where the GPT has none. Raises PeftRefused or Invalid.
    """
    adapter = read_adapter(file)
    manifest = _validated(adapter, backbone)
    if not manifest.ranks:
        raise PeftRefused(f"{file} has no LoRA tensors, and PEFT's LoRA can't be without")
    modules = list(manifest.norms)
    if manifest.critic and backbone.config.add_critic_head:
        modules.append("critic_head")
    tensors = _tensors_there(adapter, modules)
    kept = {key: adapter.metadata[key] for key in _DESCRIBING if key in adapter.metadata}
    metadata = kept | {"format": "pt", "base_digest": backbone.digest}
    config = json.dumps(_config_there(adapter, manifest, modules), indent=2, sort_keys=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / TENSOR_FILE).write_bytes(adapter_bytes(tensors, metadata))
    (out / CONFIG_FILE).write_text(config + "\n", "utf-8")
    return sorted(name for name in adapter.tensors if _name_there(name, modules) is None)


def _validated(adapter: AdapterSet, backbone: Backbone) -> Manifest:
    """Any rank will do in a file; the largest one served is a setting of each server."""
    most = max(max(tensor.shape) for tensor in adapter.tensors.values())
    return validate(adapter, backbone.config, backbone.digest, torch.float32, max_rank=most)


# In.


def _read_config(path: Path) -> PeftConfig:
    fields = _read_json(path)
    kind, bias = fields.get("peft_type"), fields.get("bias", "none")
    if kind != "LORA":
        raise PeftRefused(f"{path}: peft_type is {kind}; an adapter set can express LORA alone")
    if bias != "none":
        raise PeftRefused(
            f"{path}: bias is {bias}; biases are the backbone's, no adapter set has any"
        )
    beginning = fields.get("init_lora_weights", True)
    if beginning not in _BEGINNINGS:
        raise PeftRefused(
            f"{path}: init_lora_weights is {beginning}, which changes the backbone's own matrices"
        )
    for name in sorted(set(fields) - _SILENT - _READ):
        if fields[name]:
            raise PeftRefused(f"{path}: {name} is set, which an adapter set can't express")
    return PeftConfig(
        _rank(path, "r", fields.get("r", 8)),
        _alpha(path, "lora_alpha", fields.get("lora_alpha", 8)),
        {key: _rank(path, key, r) for key, r in _pattern(path, fields, "rank_pattern").items()},
        {key: _alpha(path, key, a) for key, a in _pattern(path, fields, "alpha_pattern").items()},
        bool(fields.get("use_rslora")),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PeftRefused(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PeftRefused(f"{path} is not JSON") from error
    if not isinstance(fields, dict):
        raise PeftRefused(f"{path} must hold a JSON object")
    return fields


def _read_tensors(path: Path) -> AdapterSet:
    try:
        return read_adapter(path)
    except OSError as error:
        raise PeftRefused(f"{path} can't be read: {error.strerror}") from error


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise PeftRefused(f"{path}: the rank {key} must be an integer above 0")
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise PeftRefused(f"{path}: the alpha {key} must be a finite number above 0")
    return float(value)


def _pattern(path: Path, fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise PeftRefused(f"{path}: {name} must be an object")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise PeftRefused(f"{path}: {name} has {key}, no regular expression") from error
    return pattern


def _matching(patterns: Mapping[str, Any], module: str) -> str:
    """PEFT's rule: the first expression that is the name's end, from a dot on, or all of it."""
    matches = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next(matches, module)


def _name_here(name: str) -> str:
    """A PEFT tensor's name in an adapter file. Raises PeftRefused where it has none."""
    plain = name.removeprefix(_PREFIX)
    match = _LORA.fullmatch(plain)
    if match:
        return f"{match[1]}{SITES[match[2]]}.{match[3]}.weight"
    if _SAVED.fullmatch(plain):
        return plain
    module = plain.partition(".lora_")[0][:100]
    if ".lora_" in plain:
        raise PeftRefused(
            f"LoRA on {module} can't be expressed, only on {', '.join(SITES)} of a layer"
        )
    raise PeftRefused(f"{module} can't be saved in an adapter set, only LayerNorms and critic_head")


def _fold_alphas(config: PeftConfig, tensors: dict[str, Tensor]) -> float:
    """The file's alpha; B of the sites that have another is changed to fit it."""
    alphas = {}
    for name, b in tensors.items():
        match = _LORA_OUT.fullmatch(name)
        if match is None or match[3] == "A":
            continue
        module = match[1] + _linear(match[2])
        if b.shape[-1] != config.rank(module):
            raise PeftRefused(
                f"{module} has rank {b.shape[-1]}, but {CONFIG_FILE} says {config.rank(module)}"
            )
        alphas[name] = config.alpha(module)
    shared = Counter(alphas.values()).most_common(1)[0][0] if alphas else config.lora_alpha
    for name, alpha in alphas.items():
        if alpha != shared:
            tensors[name] = (tensors[name].double() * (alpha / shared)).float()
    return shared


# Out.


def _tensors_there(adapter: AdapterSet, modules: Sequence[str]) -> dict[str, Tensor]:
    named = ((_name_there(name, modules), tensor) for name, tensor in adapter.tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def _name_there(name: str, modules: Sequence[str]) -> str | None:
    """An adapter tensor's name in a PEFT folder; None where it has none."""
    match = _LORA_OUT.fullmatch(name)
    if match:
        return f"{_PREFIX}{match[1]}{_linear(match[2])}.lora_{match[3]}.weight"
    return f"{_PREFIX}{name}" if name.rpartition(".")[0] in modules else None


def _linear(site: str) -> str:
    return next(linear for linear, its_site in SITES.items() if its_site == site)


def _config_there(
    adapter: AdapterSet, manifest: Manifest, modules: Sequence[str]
) -> dict[str, Any]:
    """adapter_config.json: every module by its full name, so that no other one ends like it."""
    ranks = {
        f"transformer.h.{layer}.{_linear(site)}": rank
        for layer, sites in manifest.ranks.items()
        for site, rank in sites.items()
    }
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], adapter.lora_alpha
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": list(modules) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": False,
        "use_rslora": adapter.use_rslora,
    }
