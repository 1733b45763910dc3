"""GPTConfig: the guide's fields and defaults, and the shapes that follow from them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

POOLINGS = ("mean", "cls", "last")
MAX_BLOCK_SIZE = 1 << 20  # a model holds a table of every position's angles
MAX_ANGLES = 1 << 26  # values of that table, block_size * head_dim: 256 MiB for the sines
MAX_LAYERS = 4096
MAX_UNKNOWN = 5  # keys named in an error, each cut to MAX_SHOWN characters
MAX_SHOWN = 60

# site -> (input width, output width), both in units of n_embd. A site is where a layer's LoRA is
# added; its name is the state dict's, below `transformer.h.{layer}.`
LORA_SITES = {
    "attn.lora_qkv": (1, 3),
    "attn.lora_out": (1, 1),
    "mlp.lora_fc": (1, 4),
    "mlp.lora_proj": (4, 1),
}

# linear -> (output width, input width), in units of n_embd: the four matrices the layers share
MAIN_MATRICES = {
    "attn.c_attn": (3, 1),
    "attn.c_proj": (1, 1),
    "mlp.c_fc": (4, 1),
    "mlp.c_proj": (1, 4),
}


@dataclass(frozen=True)
class GPTConfig:
    """The model's hyperparameters, named as in the guide; `pooling` is the serving default.

    Raises ValueError, with a sentence, for values no model can have.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    ignore_index: int = -100
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    cls_token_id: int | None = None
    add_critic_head: bool = False
    critic_alpha: float = 0.5
    use_lora_attn: bool = False
    use_lora_mlp: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    share_main_matrices: bool = False
    pooling: str = "mean"

    def __post_init__(self) -> None:
        _demand_numbers(self)
        _check_types(self)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            _demand(
                getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}"
            )
        _demand(
            self.block_size <= MAX_BLOCK_SIZE,
            f"block_size must be at most {MAX_BLOCK_SIZE}, not {self.block_size}",
        )
        _demand(
            self.n_embd % self.n_head == 0,
            f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}",
        )
        _demand(
            self.head_dim % 2 == 0,
            f"n_embd / n_head must be even for rotary positions, not {self.head_dim}",
        )
        _demand(
            self.block_size * self.head_dim <= MAX_ANGLES,
            f"block_size {self.block_size} times n_embd / n_head {self.head_dim} must be at most "
            f"{MAX_ANGLES}: the table of angles is as large",
        )
        _demand(
            self.n_layer <= MAX_LAYERS, f"n_layer must be at most {MAX_LAYERS}, not {self.n_layer}"
        )
        for name in ("dropout", "lora_dropout"):
            rate = getattr(self, name)
            _demand(0.0 <= rate < 1.0, f"{name} must be at least 0 and below 1, not {rate}")
        for name in ("critic_alpha", "lora_alpha"):
            value = getattr(self, name)
            _demand(math.isfinite(value), f"{name} must be finite, not {value}")
        _demand(
            self.critic_alpha >= 0, f"critic_alpha must not be negative, not {self.critic_alpha}"
        )
        _demand(self.lora_alpha > 0, f"lora_alpha must be positive, not {self.lora_alpha}")
        _demand(self.lora_rank >= 0, f"lora_rank must not be negative, not {self.lora_rank}")
        _demand(self.pooling in POOLINGS, f"pooling must be one of {', '.join(POOLINGS)}")
        _check_special_tokens(self)
        _demand(
            not 0 <= self.ignore_index < self.vocab_size,
            f"ignore_index {self.ignore_index} is a token id; targets of it would be ignored",
        )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "GPTConfig":
        """The config of a mapping. Raises ValueError for a key that is not a field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        shown = ", ".join(repr(key)[:MAX_SHOWN] for key in unknown[:MAX_UNKNOWN])
        more = f" and {len(unknown) - MAX_UNKNOWN} more" if len(unknown) > MAX_UNKNOWN else ""
        _demand(not unknown, f"unknown config key {shown}{more}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _demand(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _demand_numbers(config: "GPTConfig") -> None:
    """Integers that a tensor's size can be: so that later sums and sentences stay small."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is int:
            _demand(abs(value) < 1 << 53, f"{field.name} is too large a number")


def _check_types(config: GPTConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        wanted: Any = field.type
        if wanted is float and type(value) is int:
            object.__setattr__(config, field.name, float(value))
        elif wanted in (int, bool, float, str):
            _demand(
                type(value) is wanted,
                f"{field.name} must be of type {wanted.__name__}, not {type(value).__name__}",
            )
        else:  # int | None
            _demand(
                value is None or type(value) is int,
                f"{field.name} must be an integer or null, not {type(value).__name__}",
            )


def _check_special_tokens(config: GPTConfig) -> None:
    taken: dict[int, str] = {}
    for name in ("mask_token_id", "pad_token_id", "cls_token_id"):
        token = getattr(config, name)
        if token is None:
            continue
        _demand(
            0 <= token < config.vocab_size,
            f"{name} {token} is outside the vocabulary of {config.vocab_size}",
        )
        _demand(token not in taken, f"{name} and {taken.get(token)} are both {token}")
        taken[token] = name
