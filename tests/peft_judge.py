"""The peft library as the judge of PEFT folders: what it trains, saves, loads and computes."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from conftest import TINY, random_adapter, random_gpt, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from adapters.format import AdapterSet, read_adapter, write_adapter
from adapters.weights import weights_of
from model.checkpoint import (
    Backbone,
    backbone_tensors,
    read_backbone,
    state_dict_of,
    write_backbone,
)
from model.config import GPTConfig
from model.encoder import FINAL, Encoder
from model.gpt import GPT
from model.heads import critic_logits
from model.lora import LoraBatch
from model.packed import PackedBatch

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # float32
ALL_LINEARS = ["c_attn", "c_proj", "c_fc"]

# Twelve layers: h.1 is the beginning of h.10 and h.11.
DEEP = dataclasses.replace(TINY, n_layer=12, use_lora_attn=False, use_lora_mlp=False)
IDS = torch.randint(TINY.vocab_size, (3, 20), generator=torch.Generator().manual_seed(5))
IDS[:, 0] = TINY.cls_token_id


def make_backbone(folder: Path, config: GPTConfig) -> Backbone:
    state = random_gpt(config).state_dict()
    write_backbone(folder, config, backbone_tensors(config, state), tiny_tokenizer())
    return read_backbone(folder)


def gpt_of(backbone: Backbone) -> GPT:
    """The trainable model of a backbone folder, its own LoRA, if any, still without effect."""
    gpt = GPT(backbone.config).eval()
    missing, strange = gpt.load_state_dict(
        state_dict_of(backbone.config, backbone.tensors), strict=False
    )
    assert not strange
    assert all(".lora_" in name for name in missing)
    return gpt


def trained_by_peft(backbone: Backbone, folder: Path, **options: Any) -> GPT:
    """A model under a random LoRA of peft's, which is saved in the folder."""
    torch.manual_seed(7)
    model = get_peft_model(gpt_of(backbone), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.get_base_model().eval()


def loaded_by_peft(backbone: Backbone, folder: Path) -> GPT:
    model = PeftModel.from_pretrained(gpt_of(backbone), folder)
    return model.get_base_model().eval()


@torch.no_grad()
def peft_answers(gpt: GPT) -> tuple[Tensor, Tensor]:
    """(B, T, C) final states and (B, T) critic logits; [PAD] is read like any token."""
    keep = torch.ones_like(IDS)
    return gpt.hidden_states(IDS, keep)[-1], gpt.critic_scores(IDS, keep)


@torch.inference_mode()
def served_answers(backbone: Backbone, adapter: AdapterSet) -> tuple[Tensor, Tensor]:
    """The same of the encoder that serves."""
    rows, length = IDS.shape
    encoder = Encoder(backbone.config, backbone.tensors)
    weights = weights_of(adapter, backbone.config, torch.float32, lambda t, d: t.to(d).contiguous())
    batch = PackedBatch(IDS.flatten(), [length] * rows)
    lora = LoraBatch.of_rows(batch.lengths, [weights] * rows)
    states = encoder.forward(batch, lora)[FINAL]
    critic = weights.critic
    if critic is None:
        critic = backbone.tensors["critic_head.weight"][0]
    return states.view(rows, length, -1), critic_logits(states, critic).view(rows, length)


def assert_same(served: tuple[Tensor, Tensor], judged: tuple[Tensor, Tensor]) -> None:
    for mine, theirs in zip(served, judged, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


def write_set(path: Path, backbone: Backbone, rslora: bool = False, **options: Any) -> AdapterSet:
    metadata = {"license": "CC0-1.0"} | ({"use_rslora": "true"} if rslora else {})
    tensors = random_adapter(backbone.config, 3, **options)
    write_adapter(path, tensors, lora_alpha=6.5, base_digest=backbone.digest, metadata=metadata)
    return read_adapter(path)
