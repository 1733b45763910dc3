"""What the serving forward does between its matrix products, by torch's own operators."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import GPTConfig
from model.layers import rotary_table
from model.lora import LoraBatch, Site
from model.packed import PackedBatch, attention

# oneDNN compiles a bfloat16 kernel for each number of rows it meets (a first call takes 1 to 3 ms
# longer) and keeps about a thousand.
BF16_ROWS = 16


class PartOperators(Protocol):
    """The operators of one part: of its sequences and its adapters."""

    def norm(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """LayerNorm of x (N, C), each segment under its adapter's own weights where it has them."""

    def attention(self, qkv: Tensor) -> Tensor:
        """Attention within each sequence: qkv (N, 3C), not rotated yet -> (N, C)."""

    def add_lora(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """y + the LoRA of x, in place: model.lora.LoraBatch.add_."""

    def add_lora_gelu(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """GELU of the same; y may be changed in place."""


class Operators(Protocol):
    """The seam between the forward and what runs it.

    Matrix products meet few numbers of rows when a part's tokens are a multiple of `align`, and
    each adapter's too where `align_adapters`.
    """

    name: str
    align: int
    align_adapters: bool

    def of(self, batch: PackedBatch, lora: LoraBatch) -> PartOperators:
        """Those for a part's batch and its adapters."""


class TorchOperators:
    """In any dtype, on any device."""

    name, align_adapters = "torch", True

    def __init__(self, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.align = BF16_ROWS if device.type == "cpu" and dtype == torch.bfloat16 else 1
        self.heads, self.head_dim = config.n_head, config.head_dim
        cos, sin = rotary_table(config.block_size, config.head_dim)
        self.cos, self.sin = cos.to(device, dtype), sin.to(device, dtype)

    def of(self, batch: PackedBatch, lora: LoraBatch) -> "TorchPart":
        return TorchPart(self, batch, lora)


class TorchPart:
    def __init__(self, operators: TorchOperators, batch: PackedBatch, lora: LoraBatch) -> None:
        self.heads, self.head_dim = operators.heads, operators.head_dim
        self.batch = batch
        self.norm, self.add_lora = lora.norm, lora.add_
        self.cos = operators.cos[batch.positions].unsqueeze(1)  # (N, 1, D)
        self.sin = operators.sin[batch.positions].unsqueeze(1)

    def attention(self, qkv: Tensor) -> Tensor:
        qkv = qkv.view(-1, 3 * self.heads, self.head_dim)
        q, k = rotated(qkv[:, : 2 * self.heads], self.cos, self.sin).chunk(2, dim=1)  # (N, H, D)
        return attention(q, k, qkv[:, 2 * self.heads :], self.batch).flatten(1)

    def add_lora_gelu(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return F.gelu(self.add_lora(site, x, y))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """model.layers.rotate of x (N, H, D), with three passes over it instead of six."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
