"""An adapter set as the encoder applies it, laid out in one buffer."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from adapters.arena import aligned
from adapters.format import AdapterSet
from model.config import LORA_SITES, GPTConfig
from model.heads import SEQUENCE_HEAD
from model.lora import AdapterWeights, Classifier, SequenceHead, Site

Place = Callable[[Tensor, torch.dtype], Tensor]  # a tensor -> its copy where it is to be used


class Cursor:
    """Places one tensor behind the other in a buffer of bytes, each aligned.

    With `copy=False` it only makes the views: the bytes are there already.
    """

    def __init__(self, buffer: Tensor, copy: bool = True) -> None:
        self.buffer, self.copy, self.offset = buffer, copy, 0

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        size = tensor.numel() * dtype.itemsize
        view = self.buffer[self.offset : self.offset + size].view(dtype).view(tensor.shape)
        if self.copy:
            view.copy_(tensor)
        self.offset += aligned(size)
        return view


def placed_bytes(adapter: AdapterSet, dtype: torch.dtype) -> int:
    """The bytes that weights_of places for this adapter, alignment included."""
    return bytes_of_shapes({name: t.shape for name, t in adapter.tensors.items()}, dtype)


def bytes_of_shapes(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> int:
    """`placed_bytes`, from the shapes of the adapter's tensors alone."""
    total = 0
    for name, shape in shapes.items():
        if name != "calibration":
            in_trunk = ".lora_" in name or ".ln_" in name  # what else there is stays in float32
            itemsize = (dtype if in_trunk else torch.float32).itemsize
            total += aligned(math.prod(shape) * itemsize)
    return total


def weights_of(
    adapter: AdapterSet, config: GPTConfig, dtype: torch.dtype, place: Place
) -> AdapterWeights:
    """B transposed with the scaling in it, LayerNorms in `dtype`, the rest in float32.

    The adapter must have passed validate() for this config.
    """
    tensors = adapter.tensors
    critic, calibration = tensors.get("critic_head.weight"), tensors.get("calibration")
    cls_embedding = tensors.get("cls_embedding")
    return AdapterWeights(
        _lora(adapter, config, dtype, place),
        _norms(adapter, dtype, place),
        None if critic is None else place(critic[0], torch.float32),
        None if calibration is None else calibration.float(),
        _classifier(adapter, place),
        _sequence_head(adapter, place),
        None if cls_embedding is None else place(cls_embedding, torch.float32),
    )


def _lora(
    adapter: AdapterSet, config: GPTConfig, dtype: torch.dtype, place: Place
) -> dict[Site, tuple[Tensor, Tensor]]:
    lora: dict[Site, tuple[Tensor, Tensor]] = {}
    for layer in range(config.n_layer):
        for site in LORA_SITES:
            a = adapter.tensors.get(f"transformer.h.{layer}.{site}.A.weight")
            if a is not None:
                b = adapter.tensors[f"transformer.h.{layer}.{site}.B.weight"]
                b_t = (b.float() * adapter.scaling(a.shape[0])).t()
                lora[layer, site] = place(a, dtype), place(b_t, dtype)
    return lora


def _norms(
    adapter: AdapterSet, dtype: torch.dtype, place: Place
) -> dict[str, tuple[Tensor, Tensor | None]]:
    norms: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, weight in adapter.tensors.items():
        if ".ln_" in name and name.endswith(".weight"):
            norm = name.removesuffix(".weight")
            bias = adapter.tensors.get(f"{norm}.bias")
            norms[norm] = place(weight, dtype), None if bias is None else place(bias, dtype)
    return norms


def _classifier(adapter: AdapterSet, place: Place) -> Classifier | None:
    weight = adapter.tensors.get("classifier.weight")
    if weight is None:
        return None
    bias = adapter.tensors.get("classifier.bias")
    placed_bias = None if bias is None else place(bias, torch.float32)
    return Classifier(place(weight, torch.float32), placed_bias, adapter.labels)


def _sequence_head(adapter: AdapterSet, place: Place) -> SequenceHead | None:
    if SEQUENCE_HEAD[0] not in adapter.tensors:
        return None
    weight, a, b = (adapter.tensors[name] for name in SEQUENCE_HEAD)
    return SequenceHead(
        place(weight[0], torch.float32), place(a, torch.float32), place(b, torch.float32)
    )
