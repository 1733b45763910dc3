"""Linear8: a linear layer whose product is of 8-bit integers, on CPUs with VNNI (cpu/int8.h)."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127  # of a weight in 8 bits; -128 is not used, so that the range is even
PANEL, QUAD = 64, 4  # outputs of a panel, inputs that are multiplied together
INPUTS = 32  # what is rounded at a time


class Int8Unavailable(ValueError):
    """This processor, this install or this trunk can't be served in 8 bits."""


@dataclass(frozen=True)
class Linear8:
    """x W^T + b: W in 8 bits with a scale an output, x rounded to 8 bits row by row as it comes.

    Rows stay independent of each other, and one with a value that is not finite gives no finite
    value. `panels` is (out / 64, in / 4, 64, 4) int8; `scales` (out,) float32; `sums` (out,) int32,
    of an output's weights; `bias` (out,) bfloat16.
    """

    compiled: ctypes.CDLL
    panels: Tensor
    scales: Tensor
    sums: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, compiled: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> "Linear8":
        """Of a weight (out, in), in any floating dtype. Raises Int8Unavailable for other widths."""
        out, into = weight.shape
        if out % PANEL or into % INPUTS:
            raise Int8Unavailable(f"int8 needs n_embd to be a multiple of {PANEL}")
        weight = weight.float()
        scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        rounded = (weight / scales[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        panels = rounded.view(out // PANEL, PANEL, into // QUAD, QUAD).transpose(1, 2).contiguous()
        sums = rounded.sum(1, dtype=torch.int32)
        return cls(
            compiled,
            panels,
            scales,
            sums,
            None if bias is None else bias.to(torch.bfloat16).contiguous(),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out), bfloat16."""
        return self._multiply(x, x.new_empty(x.shape[0], self.scales.shape[0]), add=False)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual += x W^T + b, in place."""
        return self._multiply(x, residual, add=True)

    def _multiply(self, x: Tensor, y: Tensor, add: bool) -> Tensor:
        if not (x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype == torch.bfloat16):
            raise ValueError("contiguous bfloat16 tensors were expected")
        failed = self.compiled.trunkline_linear8(
            x.data_ptr(),
            *x.shape,
            y.shape[1],
            self.panels.data_ptr(),
            self.scales.data_ptr(),
            self.sums.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            add,
            y.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for rows in 8 bits")
        return y
