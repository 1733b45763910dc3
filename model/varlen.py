"""VarlenOperators: on a GPU, a packed batch's attention in one flash-attention call.

Written where there was no GPU: its plan is tested on the CPU, its kernel has not been run.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from model.config import GPTConfig
from model.lora import LoraBatch
from model.operators import TorchOperators, TorchPart, rotated
from model.packed import PackedBatch

LARGEST_HEAD_DIM = 256  # of the flash kernel


class VarlenOperators(TorchOperators):
    """torch's operators, without a call for each length among a batch's sequences."""

    name = "torch, varlen attention"

    @classmethod
    def where_possible(
        cls, config: GPTConfig, dtype: torch.dtype, device: torch.device
    ) -> "VarlenOperators | None":
        fits = config.head_dim <= LARGEST_HEAD_DIM and config.head_dim % 8 == 0
        half = dtype in (torch.bfloat16, torch.float16)
        if device.type != "cuda" or not (fits and half):
            return None
        if torch.cuda.get_device_capability(device) < (8, 0):
            return None
        return cls(config, dtype, device)

    def of(self, batch: PackedBatch, lora: LoraBatch) -> "VarlenPart":
        return VarlenPart(self, batch, lora)


class VarlenPart(TorchPart):
    """Its batch has no gaps: on a GPU nothing is aligned."""

    def __init__(self, operators: TorchOperators, batch: PackedBatch, lora: LoraBatch) -> None:
        super().__init__(operators, batch, lora)
        self.bounds, self.longest = bounds_of(batch)

    def attention(self, qkv: Tensor) -> Tensor:
        qkv = qkv.view(-1, 3 * self.heads, self.head_dim)
        q, k = rotated(qkv[:, : 2 * self.heads], self.cos, self.sin).chunk(2, dim=1)  # (N, H, D)
        v = qkv[:, 2 * self.heads :]
        y = varlen_attn(q, k, v, self.bounds, self.bounds, self.longest, self.longest)
        assert isinstance(y, Tensor)
        return y.flatten(1)


def bounds_of(batch: PackedBatch) -> tuple[Tensor, int]:
    """Where each of B sequences begins, and the last ends: (B + 1,) int32; the longest's tokens."""
    ends = [*batch.starts, batch.ids.shape[0]]
    bounds = torch.tensor(ends, dtype=torch.int32).to(batch.ids.device, non_blocking=True)
    return bounds, max(batch.lengths)
