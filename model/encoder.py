"""Encoder: the serving forward over packed tokens, with any mix of adapters.

Equal to model.gpt.GPT, which the tests hold it against; nothing here trains.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import MAIN_MATRICES, GPTConfig
from model.kernels import HEAD_DIMS, CompiledOperators
from model.linear import AnyLinear
from model.lora import LoraBatch
from model.operators import Operators, PartOperators, TorchOperators
from model.packed import PackedBatch
from model.parts import Part, parts_of
from model.quantized import Int8Unavailable, Linear8

FINAL = 0  # key of the state after ln_f; the state after block l has the key l, from 1

# Two parts of fewer tokens, or of less work, would cost more in small calls and in handing them
# over than a second core gives.
LEAST_PART_TOKENS, LEAST_PART_FLOPS = 128, 5e7


@dataclass(frozen=True)
class BlockWeights:
    attn_c_attn: AnyLinear
    attn_c_proj: AnyLinear
    mlp_c_fc: AnyLinear
    mlp_c_proj: AnyLinear
    ln_1: tuple[Tensor, Tensor | None]
    ln_2: tuple[Tensor, Tensor | None]


class Progress:
    """Moves while one caller's batches get on: with every layer of any part of them."""

    def __init__(self) -> None:
        self.steps = 0


class Encoder:
    """A backbone resident on a device.

    tensors are those of a backbone folder (model.checkpoint), by name; they are cast to `dtype`
    once. A matrix that all layers share is held once. Without `compiled` torch's operators are
    used where compiled ones could be. With `int8` the four matrices are in 8 bits (Linear8);
    raises Int8Unavailable where that can't be.
    """

    def __init__(
        self,
        config: GPTConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = True,
        int8: bool = False,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        operators = (
            CompiledOperators.where_possible(config, dtype, self.device) if compiled else None
        )
        self.operators: Operators = operators or TorchOperators(config, dtype, self.device)
        self.int8 = int8
        self._placed: dict[str, Tensor] = {}
        self._linears: dict[str, AnyLinear] = {}
        self.threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        flops = 24.0 * config.n_embd**2 * config.n_layer  # of a token, in the four matrices
        self.least_part = max(LEAST_PART_TOKENS, math.ceil(LEAST_PART_FLOPS / flops))  # tokens
        self._workers = ThreadPoolExecutor(
            self.threads, "encoder", initializer=torch.set_num_threads, initargs=(1,)
        )
        self.blocks = [self._block(tensors, layer) for layer in range(config.n_layer)]
        self.ln_f = self._pair(tensors, "transformer.ln_f")
        # (V, C) float32: ids are looked up in it, and the mask logits are taken against it
        self.wte = tensors["transformer.wte.weight"].to(self.device, torch.float32)
        cls_embedding = tensors.get("cls_embedding")
        self.cls_embedding = None if cls_embedding is None else cls_embedding.to(self.wte)

    def _place(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in self._placed:
            self._placed[name] = tensors[name].to(self.device, self.dtype).contiguous()
        return self._placed[name]

    def _pair(self, tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
        bias = self._place(tensors, f"{name}.bias") if self.config.bias else None
        return self._place(tensors, f"{name}.weight"), bias

    def _linear(self, tensors: Mapping[str, Tensor], name: str) -> AnyLinear:
        if name not in self._linears:
            self._linears[name] = (
                self._linear8(tensors, name)
                if self.int8
                else self.operators.linear(*self._pair(tensors, name))
            )
        return self._linears[name]

    def _linear8(self, tensors: Mapping[str, Tensor], name: str) -> Linear8:
        if not isinstance(self.operators, CompiledOperators):
            raise Int8Unavailable(
                "int8 needs the compiled operators: a CPU with AVX-512's VNNI and bfloat16, a C++ "
                f"compiler at install, heads of {', '.join(map(str, HEAD_DIMS))} components"
            )
        bias = tensors[f"{name}.bias"] if self.config.bias else None
        return Linear8.of(self.operators.compiled, tensors[f"{name}.weight"], bias)

    def _block(self, tensors: Mapping[str, Tensor], layer: int) -> BlockWeights:
        home = "shared" if self.config.share_main_matrices else f"transformer.h.{layer}"
        linears = {
            path.replace(".", "_"): self._linear(tensors, f"{home}.{path}")
            for path in MAIN_MATRICES
        }
        ln_1 = self._pair(tensors, f"transformer.h.{layer}.ln_1")
        ln_2 = self._pair(tensors, f"transformer.h.{layer}.ln_2")
        return BlockWeights(**linears, ln_1=ln_1, ln_2=ln_2)

    @torch.inference_mode()
    def forward(
        self,
        batch: PackedBatch,
        lora: LoraBatch,
        keep: Collection[int] = (FINAL,),
        progress: Progress | None = None,
    ) -> dict[int, Tensor]:
        """The states asked for: (N, C) in the serving dtype, by layer; FINAL is after ln_f.

        `progress` moves with it: who calls from another thread has another, or none.
        """
        progress = progress or Progress()
        kept = {
            layer: torch.empty(
                (batch.ids.shape[0], self.config.n_embd), dtype=self.dtype, device=self.device
            )
            for layer in keep
        }
        parts = list(self._parts(batch, lora))
        if len(parts) == 1 or self.threads == 1:
            if self.device.type == "cpu":
                self._share_operators(batch.ids.shape[0])
            for part in parts:
                self._through_all_layers(part, kept, progress)
        else:
            list(self._workers.map(self._through_all_layers, parts, repeat(kept), repeat(progress)))
        return kept

    def _share_operators(self, tokens: int) -> None:
        """Few tokens stay on one thread: a second gains a fifth, and on a busy machine costs a lot.

        Both wait for each other at every operator, and one of them is often not scheduled.
        """
        threads = self.threads if tokens >= self.least_part else 1
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _parts(self, batch: PackedBatch, lora: LoraBatch) -> Iterator[Part]:
        """On a CPU parts that fit the cache, one a thread at least; on a GPU the whole batch.

        A part is one thread's from the first layer to the last: threads that share each operator
        wait for each other some 150 times a batch.
        """
        tokens = batch.ids.shape[0]
        if self.device.type != "cpu":
            return parts_of(batch, lora, tokens)
        share = max(self.least_part, -(-tokens // self.threads))
        return parts_of(
            batch,
            lora,
            min(max(self.operators.part_tokens, self.least_part), share),
            self.operators.align,
            self.operators.align_adapters,
        )

    @torch.inference_mode()
    def _through_all_layers(
        self, part: Part, kept: Mapping[int, Tensor], progress: Progress
    ) -> None:
        operators = self.operators.of(part.batch, part.lora)
        x = self._embed(part.batch.ids)  # (N, C)
        for layer, block in enumerate(self.blocks):
            name = f"transformer.h.{layer}"
            normed = operators.norm(f"{name}.ln_1", x, *block.ln_1)
            x = _attention(layer, block, x, normed, operators)
            normed = operators.norm(f"{name}.ln_2", x, *block.ln_2)
            x = _mlp(layer, block, x, normed, operators)
            if layer + 1 in kept:
                kept[layer + 1][part.start : part.end] = part.real(x)
            progress.steps += 1
        if FINAL in kept:
            final = operators.norm("transformer.ln_f", x, *self.ln_f)
            kept[FINAL][part.start : part.end] = part.real(final)

    def _embed(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.wte)
        cls_token_id = self.config.cls_token_id
        if self.cls_embedding is not None and cls_token_id is not None:
            is_cls = ids.eq(cls_token_id).unsqueeze(-1)
            x = torch.where(is_cls, self.cls_embedding, x)
        return x.to(self.dtype)


def _attention(
    layer: int, block: BlockWeights, x: Tensor, normed: Tensor, operators: PartOperators
) -> Tensor:
    """x + the attention of `normed`; x may be changed in place."""
    qkv = operators.linear(block.attn_c_attn, (layer, "attn.lora_qkv"), normed)  # (N, 3C)
    y = operators.attention(qkv)  # (N, C)
    return operators.add_linear(x, block.attn_c_proj, (layer, "attn.lora_out"), y)


def _mlp(
    layer: int, block: BlockWeights, x: Tensor, normed: Tensor, operators: PartOperators
) -> Tensor:
    """x + the MLP of `normed`; x may be changed in place."""
    h = operators.linear_gelu(block.mlp_c_fc, (layer, "mlp.lora_fc"), normed)  # (N, 4C)
    return operators.add_linear(x, block.mlp_c_proj, (layer, "mlp.lora_proj"), h)
