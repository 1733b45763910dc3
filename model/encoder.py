"""Encoder: the serving forward over packed tokens, with any mix of adapters.

Equal to model.gpt.GPT, which the tests hold it against; nothing here trains.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import MAIN_MATRICES, GPTConfig
from model.layers import rotary_table, rotate
from model.lora import LoraBatch
from model.packed import PackedBatch, attention

FINAL = 0  # key of the state after ln_f; the state after block l has the key l, from 1

# Sequences don't see each other and all layers use the same matrices, so a part of this many
# tokens goes through every layer before the next starts: its activations stay in cache.
MICRO_BATCH_TOKENS = 768


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class BlockWeights:
    attn_c_attn: Linear
    attn_c_proj: Linear
    mlp_c_fc: Linear
    mlp_c_proj: Linear
    ln_1: tuple[Tensor, Tensor | None]
    ln_2: tuple[Tensor, Tensor | None]


class Encoder:
    """A backbone resident on a device.

    tensors are those of a backbone folder (model.checkpoint), by name; they are cast to `dtype`
    once. A matrix that all layers share is held once.
    """

    def __init__(
        self,
        config: GPTConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self._placed: dict[str, Tensor] = {}
        self.blocks = [self._block(tensors, layer) for layer in range(config.n_layer)]
        self.ln_f = self._pair(tensors, "transformer.ln_f")
        # (V, C) float32: ids are looked up in it, and the mask logits are taken against it
        self.wte = tensors["transformer.wte.weight"].to(self.device, torch.float32)
        cls_embedding = tensors.get("cls_embedding")
        self.cls_embedding = None if cls_embedding is None else cls_embedding.to(self.wte)
        cos, sin = rotary_table(config.block_size, config.head_dim)
        self.cos, self.sin = cos.to(self.device, dtype), sin.to(self.device, dtype)

    def _place(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in self._placed:
            self._placed[name] = tensors[name].to(self.device, self.dtype).contiguous()
        return self._placed[name]

    def _pair(self, tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
        bias = self._place(tensors, f"{name}.bias") if self.config.bias else None
        return self._place(tensors, f"{name}.weight"), bias

    def _block(self, tensors: Mapping[str, Tensor], layer: int) -> BlockWeights:
        home = "shared" if self.config.share_main_matrices else f"transformer.h.{layer}"
        linears = {
            path.replace(".", "_"): Linear(*self._pair(tensors, f"{home}.{path}"))
            for path in MAIN_MATRICES
        }
        ln_1 = self._pair(tensors, f"transformer.h.{layer}.ln_1")
        ln_2 = self._pair(tensors, f"transformer.h.{layer}.ln_2")
        return BlockWeights(**linears, ln_1=ln_1, ln_2=ln_2)

    @torch.inference_mode()
    def forward(
        self, batch: PackedBatch, lora: LoraBatch, keep: Collection[int] = (FINAL,)
    ) -> dict[int, Tensor]:
        """The states asked for: (N, C) in the serving dtype, by layer; FINAL is after ln_f."""
        kept = {
            layer: torch.empty(
                (batch.ids.shape[0], self.config.n_embd), dtype=self.dtype, device=self.device
            )
            for layer in keep
        }
        for start, part in batch.micro_batches(MICRO_BATCH_TOKENS):
            end = start + part.ids.shape[0]
            views = {layer: state[start:end] for layer, state in kept.items()}
            self._through_all_layers(part, lora.between(start, end), views)
        return kept

    def _through_all_layers(
        self, batch: PackedBatch, lora: LoraBatch, keep: Mapping[int, Tensor]
    ) -> None:
        x = self._embed(batch.ids)  # (N, C)
        cos = self.cos[batch.positions].unsqueeze(1)  # (N, 1, D)
        sin = self.sin[batch.positions].unsqueeze(1)
        for layer, block in enumerate(self.blocks):
            name = f"transformer.h.{layer}"
            normed = lora.norm(f"{name}.ln_1", x, *block.ln_1)
            x += self._attention(layer, block, normed, lora, batch, cos, sin)
            x += self._mlp(layer, block, lora.norm(f"{name}.ln_2", x, *block.ln_2), lora)
            if layer + 1 in keep:
                keep[layer + 1].copy_(x)
        if FINAL in keep:
            keep[FINAL].copy_(lora.norm("transformer.ln_f", x, *self.ln_f))

    def _embed(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.wte)
        cls_token_id = self.config.cls_token_id
        if self.cls_embedding is not None and cls_token_id is not None:
            is_cls = ids.eq(cls_token_id).unsqueeze(-1)
            x = torch.where(is_cls, self.cls_embedding, x)
        return x.to(self.dtype)

    def _attention(
        self,
        layer: int,
        block: BlockWeights,
        x: Tensor,
        lora: LoraBatch,
        batch: PackedBatch,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        qkv = lora.add_((layer, "attn.lora_qkv"), x, block.attn_c_attn(x))  # (N, 3C)
        heads = (3, self.config.n_head, self.config.head_dim)
        q, k, v = qkv.view(-1, *heads).unbind(1)  # (N, H, D) each
        y = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, batch).flatten(1)  # (N, C)
        return lora.add_((layer, "attn.lora_out"), y, block.attn_c_proj(y))

    def _mlp(self, layer: int, block: BlockWeights, x: Tensor, lora: LoraBatch) -> Tensor:
        h = F.gelu(lora.add_((layer, "mlp.lora_fc"), x, block.mlp_c_fc(x)))  # (N, 4C)
        return lora.add_((layer, "mlp.lora_proj"), h, block.mlp_c_proj(h))
