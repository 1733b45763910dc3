"""PEFT as an independent oracle: its LoRA on the same trunk, and ours, give the same states."""

import copy
import dataclasses
import json

import pytest
import torch
from conftest import TINY, random_gpt
from reference import served, states_of, under_adapter
from torch import Tensor, nn

from adapters.format import AdapterSet
from model.checkpoint import backbone_tensors
from model.config import LORA_SITES, MAIN_MATRICES, GPTConfig
from model.encoder import FINAL, Encoder
from model.gpt import GPT
from model.lora import LoraBatch
from model.packed import PackedBatch

peft = pytest.importorskip("peft")

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32
SITE_OF = dict(zip(MAIN_MATRICES, LORA_SITES, strict=True))
LENGTHS = (1, 9, 30, 64)


def a_trunk(shared: bool) -> GPT:
    fields = {"use_lora_attn": False, "use_lora_mlp": False, "share_main_matrices": shared}
    gpt = random_gpt(dataclasses.replace(TINY, n_layer=3, **fields))
    with torch.no_grad():
        gpt.wte.weight.normal_()
        for name, parameter in gpt.named_parameters():  # a shared one comes once
            if name.endswith("c_attn.weight"):
                parameter.mul_(5)  # so that attention is far from even
    return gpt


def injected(gpt: GPT, options: dict[str, object]) -> GPT:
    """A copy of gpt with PEFT's layers in it, B random."""
    config = peft.LoraConfig(
        target_modules=["c_attn", "c_proj", "c_fc"], init_lora_weights=False, **options
    )
    model = peft.inject_adapter_in_model(config, copy.deepcopy(gpt)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


def tensors_of(model: nn.Module, config: GPTConfig) -> dict[str, Tensor]:
    """PEFT's matrices under the names of an adapter file."""
    tensors = {}
    for layer in range(config.n_layer):
        for matrix, site in SITE_OF.items():
            module = model.get_submodule(f"transformer.h.{layer}.{matrix}")
            path = f"transformer.h.{layer}.{site}"
            tensors[f"{path}.A.weight"] = module.lora_A["default"].weight.detach()
            tensors[f"{path}.B.weight"] = module.lora_B["default"].weight.detach()
    return tensors


@pytest.fixture(params=["shared", "unshared"])
def trunk(request: pytest.FixtureRequest) -> GPT:
    return a_trunk(request.param == "shared")


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 16},
        {"r": 1, "lora_alpha": 5},
        {"r": 4, "lora_alpha": 4, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"c_attn": 2, "mlp.c_proj": 32}},
    ],
    ids=["plain", "rank 1", "rsLoRA", "mixed ranks"],
)
def test_peft_s_lora_as_an_adapter_set_gives_peft_s_states(
    trunk: GPT, options: dict[str, object]
) -> None:
    torch.manual_seed(0)
    theirs = injected(trunk, options)
    tensors = tensors_of(theirs, trunk.config)
    rslora = bool(options.get("use_rslora", False))
    metadata = {"lora_alpha": str(options["lora_alpha"]), "use_rslora": json.dumps(rslora)}
    ours = served(AdapterSet(tensors, metadata, ""), trunk.config, torch.float32)
    rows = [torch.randint(TINY.vocab_size, (length,)) for length in LENGTHS]
    batch = PackedBatch(torch.cat(rows), LENGTHS)
    encoder = Encoder(trunk.config, backbone_tensors(trunk.config, trunk.state_dict()))
    lora = LoraBatch.of_rows(LENGTHS, [ours] * len(rows))
    found = encoder.forward(batch, lora)[FINAL].split(LENGTHS)
    reference = under_adapter(trunk, tensors, float(options["lora_alpha"]), rslora)
    for row, state in zip(rows, found, strict=True):
        expected = states_of(theirs, row)[-1]
        base = states_of(trunk, row)[-1]
        assert (expected - base).abs().max() > 0.05, "the oracle's LoRA must do something"
        torch.testing.assert_close(state, expected, **TOLERANCE)
        torch.testing.assert_close(states_of(reference, row)[-1], expected, **TOLERANCE)
