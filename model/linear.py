"""Linear: a linear layer by torch's own operators, its weights laid out for the device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.parts import PART_TOKENS
from model.quantized import Linear8
from model.tiled import TiledLinear


class Linear:
    """x W^T + b: weight (out, in), and a packed copy of it where that is faster."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.packed = _packed(weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual += x W^T + b, in place; rounded once where the kernel can."""
        if self.packed is None:
            return residual.add_(self(x))
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self.packed, self.bias, "add"
        )
        return y


def _packed(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's blocked layout where bfloat16 is native to a CPU, else None.

    The operators are torch.compile's own for frozen linears.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PART_TOKENS)
    return packed


AnyLinear = Linear | Linear8 | TiledLinear
