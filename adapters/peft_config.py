"""adapter_config.json of a PEFT folder: what it says of the scaling, strictly.

What an adapter set can't express is refused by its field's name. The file may come with an upload:
no error holds more of it than a field's name, and its patterns are matched in linear time.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapters.errors import Invalid
from adapters.module_patterns import BadPattern, Patterns

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERNS = 10_000

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
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,100}")


class PeftRefused(Invalid):
    """A PEFT folder, or an adapter file, that can't be said in the other's terms, and why."""

    def __init__(self, message: str, reason: str = "peft", **details: Any) -> None:
        super().__init__(reason, message, **details)


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says of the scaling."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]  # by pattern of module names, the first match counts
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    dropped: tuple[str, ...] = ()  # fields that are set and have no meaning here

    @cached_property
    def _patterns(self) -> tuple[Patterns, Patterns]:
        return Patterns(self.rank_pattern), Patterns(self.alpha_pattern)

    def rank(self, module: str) -> int:
        found = self._patterns[0].match(module)
        return self.r if found is None else self.rank_pattern[found]

    def alpha(self, module: str) -> float:
        found = self._patterns[1].match(module)
        return self.lora_alpha if found is None else self.alpha_pattern[found]


def word(value: Any) -> str:
    """A name or a value of a file, where it is safe to stand in an error; else a mark."""
    text = str(value)
    return text if _WORD.fullmatch(text) else "(not a plain word)"


def parse_config(raw: bytes | bytearray) -> PeftConfig:
    """Raises PeftRefused."""
    fields = _parse_json(raw)
    kind, bias = fields.get("peft_type"), fields.get("bias", "none")
    if kind != "LORA":
        raise _refused(f"peft_type is {word(kind)}; an adapter set can express LORA alone")
    if bias != "none":
        raise _refused(f"bias is {word(bias)}; biases are the backbone's, no adapter set has any")
    beginning = fields.get("init_lora_weights", True)
    if beginning not in _BEGINNINGS:
        raise _refused(
            f"init_lora_weights is {word(beginning)}, which changes the backbone's own matrices"
        )
    for name in sorted(set(fields) - _SILENT - _READ):
        if fields[name]:
            raise _refused(f"{word(name)} is set, which an adapter set can't express")
    return PeftConfig(
        _rank("r", fields.get("r", 8)),
        _alpha("lora_alpha", fields.get("lora_alpha", 8)),
        {key: _rank(key, r) for key, r in _pattern(fields, "rank_pattern").items()},
        {key: _alpha(key, a) for key, a in _pattern(fields, "alpha_pattern").items()},
        bool(fields.get("use_rslora")),
        tuple(sorted(name for name in _SILENT if fields.get(name))),
    )


def _refused(sentence: str) -> PeftRefused:
    return PeftRefused(f"{CONFIG_FILE}: {sentence}", file=CONFIG_FILE)


def _parse_json(raw: bytes | bytearray) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PeftRefused(f"{CONFIG_FILE} is not JSON", file=CONFIG_FILE) from error
    if not isinstance(fields, dict):
        raise PeftRefused(f"{CONFIG_FILE} must hold a JSON object", file=CONFIG_FILE)
    return fields


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise _refused(f"the rank {word(key)} must be an integer above 0")
    return value


def _alpha(key: str, value: Any) -> float:
    # an integer may be too large for a float
    if type(value) not in (int, float) or not 0 < value < 1e30 or not math.isfinite(value):
        raise _refused(f"the alpha {word(key)} must be a finite number above 0")
    return float(value)


def _pattern(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise _refused(f"{name} must be an object")
    if len(pattern) > MAX_PATTERNS:
        raise _refused(f"{name} may have {MAX_PATTERNS} patterns")
    try:
        Patterns(pattern)
    except BadPattern as error:
        raise _refused(f"{name} has a pattern that is not understood: {error}") from error
    return pattern
