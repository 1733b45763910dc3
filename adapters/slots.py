"""Adapter sets on the device, in the serving dtype, ready to be applied."""

from collections.abc import Callable

import torch
from torch import Tensor

from adapters.format import AdapterSet
from model.config import LORA_SITES, GPTConfig
from model.lora import AdapterWeights, Classifier, Site

Place = Callable[[Tensor, torch.dtype], Tensor]  # a CPU tensor -> its copy on the device


def weights_of(
    adapter: AdapterSet, config: GPTConfig, dtype: torch.dtype, place: Place
) -> AdapterWeights:
    """The adapter as the encoder applies it: B transposed with the scaling in it, heads float32.

    The adapter must have passed validate() for this config.
    """
    tensors = adapter.tensors
    lora: dict[Site, tuple[Tensor, Tensor]] = {}
    for layer in range(config.n_layer):
        for site in LORA_SITES:
            a = tensors.get(f"transformer.h.{layer}.{site}.A.weight")
            if a is not None:
                b = tensors[f"transformer.h.{layer}.{site}.B.weight"]
                b_t = (b.float() * adapter.scaling(a.shape[0])).t()
                lora[layer, site] = place(a, dtype), place(b_t, dtype)
    norms = {
        name.removesuffix(".weight"): (
            place(tensor, dtype),
            place(tensors[_bias_of(name)], dtype) if _bias_of(name) in tensors else None,
        )
        for name, tensor in tensors.items()
        if ".ln_" in name and name.endswith(".weight")
    }
    critic, calibration = tensors.get("critic_head.weight"), tensors.get("calibration")
    return AdapterWeights(
        lora,
        norms,
        None if critic is None else place(critic[0], torch.float32),
        None if calibration is None else calibration.float(),
        _classifier(adapter, place),
    )


def _bias_of(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + "bias"


def _classifier(adapter: AdapterSet, place: Place) -> Classifier | None:
    weight = adapter.tensors.get("classifier.weight")
    if weight is None:
        return None
    bias = adapter.tensors.get("classifier.bias")
    placed_bias = None if bias is None else place(bias, torch.float32)
    return Classifier(place(weight, torch.float32), placed_bias, adapter.labels)
