"""The backbone folder: strict reading and writing (config, tensors, tokenizer, calibration)."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from model.config import MAIN_MATRICES, GPTConfig
from model.heads import CALIBRATION_BUCKETS
from model.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
TENSOR_FILE = "backbone.safetensors"
TOKENIZER_FILE = "tokenizer.json"
CALIBRATION_FILE = "calibration.json"

_AGREE = f"it must have the tensors that {CONFIG_FILE} describes: take both from one backbone"
MAX_JSON_BYTES = 1 << 20  # of config.json and calibration.json
MAX_TOKENIZER_BYTES = 256 << 20
MAX_HEADER_BYTES = 8 << 20  # of the tensor file
LEAST_BYTES = 2  # of a value in a dtype that is served

_ANEW = "take it from a copy of the folder, or run `trunkline import` again"
_AS_FOLDER = "`trunkline import` makes a backbone folder of a training checkpoint"

Shape = tuple[int, ...]
STORED_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class BackboneError(ValueError):
    """A backbone folder, or what should become one, is not as the format says."""


@dataclass(frozen=True)
class Backbone:
    """A backbone folder in memory. `tensors` are on the CPU, in their stored dtypes."""

    id: str
    config: GPTConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    calibration: Tensor | None  # (100,) float32
    digest: str  # sha256:<64 hex>


def norm_names(config: GPTConfig) -> list[str]:
    """The LayerNorms' state-dict names, without .weight and .bias."""
    layers = range(config.n_layer)
    return [f"transformer.h.{i}.{n}" for i in layers for n in ("ln_1", "ln_2")] + [
        "transformer.ln_f"
    ]


def norm_shapes(config: GPTConfig) -> dict[str, Shape]:
    """Every LayerNorm tensor's shape, by name."""
    parts = ("weight", "bias") if config.bias else ("weight",)
    return {f"{name}.{part}": (config.n_embd,) for name in norm_names(config) for part in parts}


def required_shapes(config: GPTConfig) -> dict[str, Shape]:
    """The tensors every backbone of this config has."""
    width = config.n_embd
    homes = (
        ["shared"]
        if config.share_main_matrices
        else [f"transformer.h.{layer}" for layer in range(config.n_layer)]
    )
    shapes: dict[str, Shape] = {"transformer.wte.weight": (config.vocab_size, width)}
    for home in homes:
        for path, (out, into) in MAIN_MATRICES.items():
            shapes[f"{home}.{path}.weight"] = (out * width, into * width)
            if config.bias:
                shapes[f"{home}.{path}.bias"] = (out * width,)
    return shapes | norm_shapes(config)


def optional_shapes(config: GPTConfig) -> dict[str, Shape]:
    """The heads a backbone may have; the sequence head's three tensors come together or not."""
    width = config.n_embd
    shapes: dict[str, Shape] = {"critic_head.weight": (1, width)}
    if config.cls_token_id is not None:
        shapes["cls_embedding"] = (width,)
    return shapes | {
        "sequence_head.base_predictor.weight": (1, width),
        "sequence_head.A": (1,),
        "sequence_head.B": (1,),
    }


def check_tensors(config: GPTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises BackboneError unless these are exactly a backbone's tensors, all finite."""
    required, optional = required_shapes(config), optional_shapes(config)
    missing = [name for name in required if name not in tensors]
    if missing:
        raise BackboneError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    unknown = [name for name in tensors if name not in required and name not in optional]
    if unknown:
        raise BackboneError(f"{len(unknown)} tensors are not of this model: {unknown[0]}")
    sequence = [name for name in tensors if name.startswith("sequence_head.")]
    if len(sequence) not in (0, 3):
        raise BackboneError(f"the sequence head has three tensors; only {sequence} are there")
    for name, tensor in tensors.items():
        wanted = (required | optional)[name]
        if tuple(tensor.shape) != wanted:
            raise BackboneError(f"{name} has shape {list(tensor.shape)}, not {list(wanted)}")
        if tensor.dtype not in STORED_DTYPES:
            raise BackboneError(f"{name} is {tensor.dtype}; F32, F16 and BF16 are served")
        if not torch.isfinite(tensor).all():
            raise BackboneError(f"{name} has values that are not finite")


def backbone_digest(config: GPTConfig, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the config (JSON, sorted keys, no spaces) and, by name, each tensor.

    A tensor adds the line `name dtype [shape]` and its bytes, both as the file has them.
    """
    sha = hashlib.sha256(_canonical(config.to_dict()))
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"\n{name} {STORED_DTYPES[tensor.dtype]} {list(tensor.shape)}\n".encode())
        sha.update(tensor.view(torch.uint8).numpy().data)
    return f"sha256:{sha.hexdigest()}"


def read_backbone(folder: Path) -> Backbone:
    """Raises BackboneError, with a sentence that names the file, for anything not as it must be."""
    if not folder.is_dir():
        reason = f"it is a file; {_AS_FOLDER}" if folder.is_file() else "no such folder"
        raise BackboneError(f"{folder} is not a backbone folder: {reason}")
    if not os.path.lexists(folder / CONFIG_FILE):
        raise BackboneError(
            f"{folder} is not a backbone folder: its {CONFIG_FILE} is missing; {_AS_FOLDER}"
        )
    fields = _read_json(folder / CONFIG_FILE, dict)
    try:
        config = GPTConfig.from_dict(fields)
    except ValueError as error:
        raise BackboneError(f"{folder / CONFIG_FILE}: {error}; {_ANEW}") from error
    tensors = _read_tensors(folder / TENSOR_FILE, config)
    try:
        check_tensors(config, tensors)
    except BackboneError as error:
        raise BackboneError(f"{folder / TENSOR_FILE}: {error}; {_AGREE}") from error
    tokenizer = _read_tokenizer(folder / TOKENIZER_FILE, config)
    calibration = _read_calibration(folder / CALIBRATION_FILE)
    digest = backbone_digest(config, tensors)
    return Backbone(folder.resolve().name, config, tensors, tokenizer, calibration, digest)


def write_backbone(
    folder: Path,
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    calibration: Tensor | None = None,
) -> str:
    """Write a backbone folder and return its digest. config.json comes last: without it, no folder.

    Raises BackboneError, before anything is written, for tensors that read_backbone would refuse.
    """
    check_tensors(config, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _replace(folder / TENSOR_FILE, lambda path: path.write_bytes(save(contiguous)))
    _replace(folder / TOKENIZER_FILE, tokenizer.save)
    if calibration is not None:
        text = json.dumps(calibration.tolist())
        _replace(folder / CALIBRATION_FILE, lambda path: _write_text(path, text))
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    _replace(folder / CONFIG_FILE, lambda path: _write_text(path, text))
    return backbone_digest(config, tensors)


def with_sharing_of(config: GPTConfig, state: Mapping[str, Tensor]) -> GPTConfig:
    """The config with `share_main_matrices` set where all layers of the state have equal matrices.

    A config that claims sharing keeps the claim: backbone_tensors then says what differs.
    """
    _demand_state(config, state)
    shared = config.share_main_matrices or all(
        _layer_that_differs(config, state, f"{path}.{part}") is None
        for path in MAIN_MATRICES
        for part in (("weight", "bias") if config.bias else ("weight",))
    )
    return dataclasses.replace(config, share_main_matrices=shared)


def backbone_tensors(config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A GPT's state dict as a backbone's tensors: shared matrices once, no LoRA.

    Raises BackboneError where matrices that the config calls shared differ between layers.
    """
    _demand_state(config, state)
    names = {*required_shapes(config), *optional_shapes(config)}
    tensors = {name: state[name].detach().clone() for name in names if name in state}
    if config.share_main_matrices:
        for name in required_shapes(config):
            if name.startswith("shared."):
                tensors[name] = _shared_by_all(config, state, name.removeprefix("shared."))
    check_tensors(config, tensors)
    return tensors


def state_dict_of(config: GPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's tensors under GPT's state-dict names: the inverse of backbone_tensors."""
    state = {name: t for name, t in tensors.items() if not name.startswith("shared.")}
    state["lm_head.weight"] = tensors["transformer.wte.weight"]
    for name, tensor in tensors.items():
        if name.startswith("shared."):
            for layer in range(config.n_layer):
                state[f"transformer.h.{layer}.{name.removeprefix('shared.')}"] = tensor
    return state


def _demand_state(config: GPTConfig, state: Mapping[str, Tensor]) -> None:
    for name in required_shapes(dataclasses.replace(config, share_main_matrices=False)):
        if name not in state:
            raise BackboneError(f"the checkpoint has no {name}")
    wte = state["transformer.wte.weight"]
    lm_head = state.get("lm_head.weight", wte)
    if lm_head.dtype != wte.dtype or not torch.equal(wte, lm_head):
        raise BackboneError("lm_head.weight is not tied to transformer.wte.weight")


def _shared_by_all(config: GPTConfig, state: Mapping[str, Tensor], name: str) -> Tensor:
    layer = _layer_that_differs(config, state, name)
    if layer is not None:
        raise BackboneError(
            f"share_main_matrices is set, but {name} of layer {layer} differs from layer 0's: "
            "set it to False in model_args, and the matrices are stored layer by layer"
        )
    return state[f"transformer.h.0.{name}"].detach().clone()


def _layer_that_differs(config: GPTConfig, state: Mapping[str, Tensor], name: str) -> int | None:
    """The first layer whose tensor is not exactly layer 0's; None where all are equal."""
    first = state[f"transformer.h.0.{name}"]
    for layer in range(1, config.n_layer):
        other = state[f"transformer.h.{layer}.{name}"]
        if other.dtype != first.dtype or not torch.equal(other, first):
            return layer
    return None


def _demand_file(path: Path, most: int | None = None) -> int:
    """Its size. Raises BackboneError where it is no readable file, or larger than `most` bytes."""
    try:
        if not path.is_file():
            there = "is not a plain file" if path.exists() else "is missing"
            raise BackboneError(f"{path} {there}; {_ANEW}")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BackboneError(
            f"{path} can't be read: {error.strerror}; let the server's user read it"
        ) from error
    if most is not None and size > most:
        raise BackboneError(f"{path} has {size} bytes; such a file has at most {most}; {_ANEW}")
    return size


def _read_json(path: Path, kind: type) -> Any:
    _demand_file(path, MAX_JSON_BYTES)
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise BackboneError(f"{path} is not JSON: {why}; {_ANEW}") from error
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise BackboneError(f"{path} must hold a JSON {wanted}; {_ANEW}")
    return value


def _read_tensors(path: Path, config: GPTConfig) -> dict[str, Tensor]:
    """All tensors; none is made where the file is too small for the config."""
    size = _demand_file(path)
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > min(size, MAX_HEADER_BYTES):
            raise BackboneError(
                f"{path} is not a safetensors file: its header is too long; {_ANEW}"
            )
    described = _least_values(config) * LEAST_BYTES
    if size < described:
        raise BackboneError(
            f"{path} has {size} bytes, and the tensors that {CONFIG_FILE} describes have at least "
            f"{described}: it is cut off, or the two are not of one backbone; {_ANEW}"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{path} is not a safetensors file: {error}; {_ANEW}") from error


def _least_values(config: GPTConfig) -> int:
    """How many values the largest of the required tensors have together."""
    width, copies = config.n_embd, 1 if config.share_main_matrices else config.n_layer
    matrices = sum(out * into for out, into in MAIN_MATRICES.values()) * width * width
    norms = 2 * config.n_layer * width
    return config.vocab_size * width + copies * matrices + norms


def _read_tokenizer(path: Path, config: GPTConfig) -> Tokenizer:
    _demand_file(path, MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception
        raise BackboneError(
            f"{path} is not a tokenizer file: {str(error)[:300]}; {_ANEW}"
        ) from error
    if tokenizer.vocab_size > config.vocab_size:
        raise BackboneError(
            f"{path} has {tokenizer.vocab_size} tokens, more than vocab_size {config.vocab_size}; "
            f"{_AGREE}"
        )
    return tokenizer


def _read_calibration(path: Path) -> Tensor | None:
    if not os.path.lexists(path):
        return None
    values = _read_json(path, list)
    proper = all(type(v) in (int, float) and math.isfinite(v) and 0 <= v <= 1 for v in values)
    if len(values) != CALIBRATION_BUCKETS or not proper:
        raise BackboneError(f"{path} must hold {CALIBRATION_BUCKETS} numbers from 0 to 1; {_ANEW}")
    return torch.tensor(values, dtype=torch.float32)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _replace(path: Path, write: Any) -> None:
    """Let `write` fill a temporary file, then put it in path's place: whole or not at all."""
    part = path.with_name(path.name + ".tmp")
    write(part)
    os.replace(part, path)
