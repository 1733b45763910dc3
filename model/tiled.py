"""TiledLinear: a linear layer by AMX, with LoRA, GELU or a sum in one pass (cpu/linear.h)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_ROWS = 16  # of x


@dataclass(frozen=True)
class SegmentPointers:
    """Where each segment of x begins and ends, and its LoRA's a (r, in) and b (r, out); a is 0
    where a segment has none. Arrays of one length."""

    starts: "ctypes.Array[ctypes.c_int64]"
    ends: "ctypes.Array[ctypes.c_int64]"
    a: "ctypes.Array[ctypes.c_int64]"
    b: "ctypes.Array[ctypes.c_int64]"
    ranks: "ctypes.Array[ctypes.c_int64]"


@dataclass(frozen=True)
class TiledLinear:
    """x W^T + b and what follows it, written once.

    `panels` is W as (out / 32, in / 32, 2, 16, 32), bfloat16; `bias` (out,) bfloat16.
    """

    compiled: ctypes.CDLL
    panels: Tensor
    bias: Tensor | None
    shape: Sequence[int]  # out, in

    @classmethod
    def of(cls, compiled: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> "TiledLinear":
        """Of a contiguous bfloat16 weight (out, in), both multiples of 32."""
        out, into = weight.shape
        panels = torch.empty(out // 32, into // 32, 2, 16, 32, dtype=torch.bfloat16)
        compiled.trunkline_lay_panels(weight.data_ptr(), into, out, panels.data_ptr())
        return cls(compiled, panels, bias, (out, into))

    def run(
        self, x: Tensor, segments: SegmentPointers, add_to: Tensor | None = None, gelu: bool = False
    ) -> Tensor:
        """x (N, in), N at least LEAST_ROWS -> (N, out), or added to `add_to` in place."""
        y = x.new_empty(x.shape[0], self.shape[0]) if add_to is None else add_to
        if not (x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype == torch.bfloat16):
            raise ValueError("contiguous bfloat16 tensors were expected")
        failed = self.compiled.trunkline_linear(
            x.data_ptr(),
            *x.shape,
            y.shape[1],
            self.panels.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            add_to is not None,
            gelu,
            len(segments.starts),
            segments.starts,
            segments.ends,
            segments.a,
            segments.b,
            segments.ranks,
            y.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for a linear layer's scratch")
        return y
