"""PEFT folders in and out: adapter_config.json and adapter_model.safetensors, without peft itself.

PEFT knows an alpha for each module, an adapter file one for all. The file gets the alpha that most
sites have; a site with another one gets B * (its alpha / the file's), taken in float64 and rounded
once to float32, so that scaling * B is the same. The way out needs no such thing: ranks that
differ go into rank_pattern, and PEFT's scaling follows from them as this format's does.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.format import FORMAT, AdapterSet, adapter_bytes, parse_adapter, read_adapter
from adapters.peft_config import CONFIG_FILE, PeftConfig, PeftRefused, parse_config, word
from adapters.staging import write_whole
from adapters.validate import Manifest, validate
from model.checkpoint import Backbone

TENSOR_FILE = "adapter_model.safetensors"

# the linear that PEFT wraps -> the site where the same LoRA is added here
SITES = {
    "attn.c_attn": "attn.lora_qkv",
    "attn.c_proj": "attn.lora_out",
    "mlp.c_fc": "mlp.lora_fc",
    "mlp.c_proj": "mlp.lora_proj",
}

_PREFIX = "base_model.model."
# In front of a name, in any order and number: PEFT's own, torch.compile's, and DDP's
_PREFIXES = re.compile(r"(?:base_model\.model\.|base_model\.|_orig_mod\.|module\.|model\.)*")
_LORA = re.compile(
    # PEFT names the adapter where a state dict was saved whole: lora_A.default.weight
    rf"(transformer\.h\.[0-9]{{1,6}}\.)({'|'.join(map(re.escape, SITES))})"
    r"\.lora_([AB])(?:\.[^.]{1,100})?\.weight"
)
_WRAPPED = re.compile(r"\.modules_to_save\.[^.]{1,100}(?=\.)")
_SAVED = re.compile(
    r"transformer\.(h\.[0-9]{1,6}\.ln_[12]|ln_f)\.(weight|bias)|critic_head\.weight"
    r"|sequence_head\.(base_predictor\.weight|[AB])"
)
_LORA_OUT = re.compile(r"(transformer\.h\.[0-9]+\.)([a-z]+\.lora_[a-z]+)\.([AB])\.weight")

_DESCRIBING = ("created_at", "description", "license", "metrics")  # metadata that travels along


@dataclass(frozen=True)
class PeftFolder:
    """The two files of a PEFT folder in memory; `others` is how many more there were."""

    config: bytes | bytearray
    tensors: bytearray
    others: int = 0


@dataclass(frozen=True)
class Converted:
    """An adapter file made of a PEFT folder, what it changes, and what became of the folder."""

    file: bytes
    manifest: Manifest
    report: Mapping[str, Any]


def convert(folder: PeftFolder, backbone: Backbone) -> Converted:
    """Make an adapter file of a PEFT folder.

    Raises PeftRefused for what an adapter set can't express, Invalid for tensors that do not fit
    the backbone.
    """
    config = parse_config(folder.config)
    saved = parse_adapter(folder.tensors)
    tensors = _tensors_here(saved)
    _demand_layers(tensors, backbone.config.n_layer)
    alpha, folded = _fold_alphas(config, tensors)
    metadata = {key: saved.metadata[key] for key in _DESCRIBING if key in saved.metadata}
    metadata |= {"use_rslora": "true"} if config.use_rslora else {}
    metadata |= {
        "base_digest": saved.metadata.get("base_digest", backbone.digest),
        "format": FORMAT,
        "lora_alpha": repr(alpha),
    }
    manifest = _validated(AdapterSet(tensors, metadata, ""), backbone)
    report = {
        "from": "peft",
        "lora": sum(map(len, manifest.ranks.values())),
        "saved": [*manifest.norms, *_heads(manifest)],
        "lora_alpha": alpha,
        "folded": folded,
        "dropped": list(config.dropped),
        "ignored_files": folder.others,
    }
    return Converted(adapter_bytes(tensors, metadata), manifest, report)


def read_folder(folder: Path) -> PeftFolder:
    """Raises PeftRefused for a folder without one of the two files."""
    try:
        config = (folder / CONFIG_FILE).read_bytes()
        return PeftFolder(config, bytearray((folder / TENSOR_FILE).read_bytes()))
    except OSError as error:
        raise PeftRefused(f"{error.filename} can't be read: {error.strerror}") from error


def import_peft(folder: Path, backbone: Backbone, out: Path) -> Manifest:
    """Make the adapter file `out` of a PEFT folder; what it changes.

    Raises as `convert` does; then nothing is written.
    """
    converted = convert(read_folder(folder), backbone)
    write_whole(out, converted.file)
    return converted.manifest


def export_peft(file: Path, backbone: Backbone, out: Path) -> list[str]:
    """Make the PEFT folder `out` of an adapter file, for model.gpt.GPT of the backbone.

    Returns the names of the tensors that PEFT has no place for: calibration, classifier, CLS
    embedding, and a head that the backbone's GPT has not. Raises PeftRefused or Invalid.
    """
    adapter = read_adapter(file)
    manifest = _validated(adapter, backbone)
    if not manifest.ranks:
        raise PeftRefused(f"{file} has no LoRA tensors, and PEFT's LoRA can't be without")
    modules = manifest.norms + [head for head in _heads(manifest) if _gpt_has(head, backbone)]
    tensors = _tensors_there(adapter, modules)
    kept = {key: adapter.metadata[key] for key in _DESCRIBING if key in adapter.metadata}
    metadata = kept | {"format": "pt", "base_digest": backbone.digest}
    config = json.dumps(_config_there(adapter, manifest, modules), indent=2, sort_keys=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / TENSOR_FILE).write_bytes(adapter_bytes(tensors, metadata))
    (out / CONFIG_FILE).write_text(config + "\n", "utf-8")
    return sorted(name for name in adapter.tensors if _name_there(name, modules) is None)


def _heads(manifest: Manifest) -> list[str]:
    """The heads that PEFT saves as modules of their own."""
    carried = {"critic_head": manifest.critic, "sequence_head": manifest.sequence_head}
    return [head for head, is_carried in carried.items() if is_carried]


def _gpt_has(head: str, backbone: Backbone) -> bool:
    if head == "critic_head":
        return backbone.config.add_critic_head
    return backbone.config.cls_token_id is not None


def _validated(adapter: AdapterSet, backbone: Backbone) -> Manifest:
    """Any rank will do in a file; the largest one served is a setting of each server."""
    most = max(max(tensor.shape) for tensor in adapter.tensors.values())
    return validate(adapter, backbone.config, backbone.digest, torch.float32, max_rank=most)


# In.


def _tensors_here(saved: AdapterSet) -> dict[str, Tensor]:
    """The tensors by their names in an adapter file. Raises PeftRefused."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in saved.tensors.items():
        here = _name_here(name)
        if here in tensors:
            raise PeftRefused(
                f"{TENSOR_FILE}: {here} comes from two tensors; is there more than one adapter?",
                "duplicate_name",
                file=TENSOR_FILE,
            )
        if here is not None:
            tensors[here] = tensor
    if not tensors:
        raise PeftRefused(f"{TENSOR_FILE} has no trained tensors", "no_tensors", file=TENSOR_FILE)
    return tensors


def _name_here(name: str) -> str | None:
    """A PEFT tensor's name in an adapter file; None for a backbone's own tensor that was saved too.

    Raises PeftRefused where it has none.
    """
    plain = _PREFIXES.sub("", name[:1000], count=1)
    if ".original_module." in plain:
        return None
    match = _LORA.fullmatch(plain)
    if match:
        return f"{match[1]}{SITES[match[2]]}.{match[3]}.weight"
    plain = _WRAPPED.sub("", plain)
    if _SAVED.fullmatch(plain):
        return plain
    module = word(plain.partition(".lora_")[0][:100])
    if ".lora_magnitude_vector" in plain:
        raise _unsaid(f"DoRA on {module} can't be expressed: train with use_dora=False")
    if ".lora_" in plain:
        raise _unsaid(f"LoRA on {module} can't be expressed, only on {', '.join(SITES)} of a layer")
    raise _unsaid(
        f"{module} can't be saved in an adapter set, only LayerNorms, critic_head and sequence_head"
    )


def _unsaid(sentence: str) -> PeftRefused:
    return PeftRefused(sentence, file=TENSOR_FILE)


def _demand_layers(tensors: Iterable[str], n_layer: int) -> None:
    """Raises PeftRefused for a layer beyond the backbone's.

    Before the config's patterns are matched: a file may name many more layers than there are.
    """
    for name in tensors:
        match = _LORA_OUT.fullmatch(name)
        if match and int(match[1].split(".")[2]) >= n_layer:
            sentence = f"{name}: the backbone has {n_layer} layers"
            raise PeftRefused(sentence, "layer_out_of_range", file=TENSOR_FILE)


def _fold_alphas(config: PeftConfig, tensors: dict[str, Tensor]) -> tuple[float, int]:
    """The file's alpha, and how many sites have another, whose B is changed to fit it."""
    alphas = {}
    for name, b in tensors.items():
        match = _LORA_OUT.fullmatch(name)
        if match is None or match[3] == "A":
            continue
        module = match[1] + _linear(match[2])
        if b.shape[-1] != config.rank(module):
            raise PeftRefused(
                f"{module} has rank {b.shape[-1]}, but {CONFIG_FILE} says {config.rank(module)}",
                "rank",
                file=TENSOR_FILE,
            )
        alphas[name] = config.alpha(module)
    shared = Counter(alphas.values()).most_common(1)[0][0] if alphas else config.lora_alpha
    for name, alpha in alphas.items():
        if alpha != shared:
            tensors[name] = (tensors[name].double() * (alpha / shared)).float()
    return shared, sum(alpha != shared for alpha in alphas.values())


# Out.


def _tensors_there(adapter: AdapterSet, modules: Sequence[str]) -> dict[str, Tensor]:
    named = ((_name_there(name, modules), tensor) for name, tensor in adapter.tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def _name_there(name: str, modules: Sequence[str]) -> str | None:
    """An adapter tensor's name in a PEFT folder; None where it has none."""
    match = _LORA_OUT.fullmatch(name)
    if match:
        return f"{_PREFIX}{match[1]}{_linear(match[2])}.lora_{match[3]}.weight"
    saved = any(name.startswith(f"{module}.") for module in modules)
    return f"{_PREFIX}{name}" if saved else None


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
