"""Encoder: the serving forward over packed tokens, with any mix of adapters.

Equal to model.gpt.GPT, which the tests hold it against; nothing here trains.
"""

import ctypes
import math
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import MAIN_MATRICES, GPTConfig
from model.kernels import HEAD_DIMS, CompiledOperators
from model.lora import LoraBatch
from model.operators import Operators, PartOperators, TorchOperators
from model.packed import PackedBatch
from model.parts import Part, parts_of
from model.quantized import Int8Unavailable, Linear8
from model.stack import Panels, Stack

FINAL = 0  # key of the state after ln_f; the state after block l has the key l, from 1

# Sequences don't see each other and all layers use the same matrices, so a part of this many
# tokens goes through every layer before the next starts: its activations stay in cache. A Stack
# divides its parts for the caches itself.
PART_TOKENS, STACK_PART_TOKENS = 768, 4096
# Two parts of fewer tokens, or of less work, would cost more in small calls and in handing them
# over than a second core gives.
LEAST_PART_TOKENS, LEAST_PART_FLOPS = 128, 5e7


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


@dataclass(frozen=True)
class BlockWeights:
    attn_c_attn: Linear | Linear8
    attn_c_proj: Linear | Linear8
    mlp_c_fc: Linear | Linear8
    mlp_c_proj: Linear | Linear8
    ln_1: tuple[Tensor, Tensor | None]
    ln_2: tuple[Tensor, Tensor | None]


def _operators(
    config: GPTConfig, dtype: torch.dtype, device: torch.device, compiled: bool
) -> Operators:
    """The fastest that this device has."""
    return (
        (CompiledOperators.where_possible(config, dtype, device) if compiled else None)
        or _varlen(config, dtype, device)
        or TorchOperators(config, dtype, device)
    )


def _varlen(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> Operators | None:
    if device.type != "cuda":
        return None
    # Here, because it brings all of torch's compiler: a second of every start on a CPU.
    from model.varlen import VarlenOperators  # noqa: PLC0415

    return VarlenOperators.where_possible(config, dtype, device)


class Progress:
    """Moves while one caller's batches get on: with every layer of any part of them."""

    def __init__(self) -> None:
        self._steps = ctypes.c_int64()  # compiled code counts in it

    @property
    def steps(self) -> int:
        return self._steps.value

    def step(self) -> None:
        self._steps.value += 1

    @property
    def counter(self) -> "ctypes.c_int64":
        return self._steps


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
        self.operators = _operators(config, dtype, self.device, compiled)
        self.int8 = int8
        self._placed: dict[str, Tensor] = {}
        self._linears: dict[str, Linear | Linear8] = {}
        self.threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        flops = 24.0 * config.n_embd**2 * config.n_layer  # of a token, in the four matrices
        self.least_part = max(LEAST_PART_TOKENS, math.ceil(LEAST_PART_FLOPS / flops))  # tokens
        self._workers = ThreadPoolExecutor(
            self.threads, "encoder", initializer=torch.set_num_threads, initargs=(1,)
        )
        self.ln_f = self._pair(tensors, "transformer.ln_f")
        self.stack = self._stack(tensors)
        self.blocks = [self._block(tensors, layer) for layer in range(config.n_layer)]
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

    def _linear(self, tensors: Mapping[str, Tensor], name: str) -> Linear | Linear8:
        if name not in self._linears:
            self._linears[name] = (
                self._linear8(tensors, name) if self.int8 else Linear(*self._pair(tensors, name))
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

    def _home(self, layer: int) -> str:
        """Where a layer's four matrices are."""
        return "shared" if self.config.share_main_matrices else f"transformer.h.{layer}"

    def _stack(self, tensors: Mapping[str, Tensor]) -> Stack | None:
        """All layers in one call, where the processor can."""
        operators = self.operators
        if not isinstance(operators, CompiledOperators) or not operators.tiles or self.int8:
            return None
        panels: dict[str, Panels] = {}
        for layer in range(self.config.n_layer):
            for path in MAIN_MATRICES:
                name = f"{self._home(layer)}.{path}"
                if name not in panels:
                    panels[name] = Panels(operators.compiled, *self._pair(tensors, name))
        layers = range(self.config.n_layer)
        names = [f"transformer.h.{layer}.{norm}" for layer in layers for norm in ("ln_1", "ln_2")]
        norms = {name: self._pair(tensors, name) for name in names}
        return Stack(
            operators.compiled,
            self.config.n_head,
            (operators.cos, operators.sin),
            [[panels[f"{self._home(layer)}.{path}"] for path in MAIN_MATRICES] for layer in layers],
            norms | {"transformer.ln_f": self.ln_f},
        )

    def _block(self, tensors: Mapping[str, Tensor], layer: int) -> BlockWeights:
        linears = {
            path.replace(".", "_"): self._linear(tensors, f"{self._home(layer)}.{path}")
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
            running = [
                self._workers.submit(self._through_all_layers, part, kept, progress)
                for part in parts
            ]
            wait(running)  # all, whichever fails: they read the adapters' memory
            for part_done in running:
                part_done.result()
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
        most = STACK_PART_TOKENS if self.stack else PART_TOKENS
        return parts_of(
            batch,
            lora,
            min(max(most, self.least_part), share),
            self.operators.align,
            self.operators.align_adapters,
        )

    @torch.inference_mode()
    def _through_all_layers(
        self, part: Part, kept: Mapping[int, Tensor], progress: Progress
    ) -> None:
        x = self._embed(part.batch.ids, part.lora)  # (N, C)
        if self.stack and self.stack.pays(part.lora):
            to = {layer: states[part.start : part.end] for layer, states in kept.items()}
            real = part.end - part.start  # what gaps there are come after it
            self.stack.run(x, part.batch, part.lora, real, to, progress.counter)
            return
        operators = self.operators.of(part.batch, part.lora)
        for layer, block in enumerate(self.blocks):
            name = f"transformer.h.{layer}"
            normed = operators.norm(f"{name}.ln_1", x, *block.ln_1)
            x = _attention(layer, block, x, normed, operators)
            normed = operators.norm(f"{name}.ln_2", x, *block.ln_2)
            x = _mlp(layer, block, x, normed, operators)
            if layer + 1 in kept:
                kept[layer + 1][part.start : part.end] = part.real(x)
            progress.step()
        if FINAL in kept:
            final = operators.norm("transformer.ln_f", x, *self.ln_f)
            kept[FINAL][part.start : part.end] = part.real(final)

    def _embed(self, ids: Tensor, lora: LoraBatch) -> Tensor:
        """ids (N,) -> (N, C): rows of wte, at [CLS] the adapter's embedding or the trunk's.

        Every path of the forward begins here, so it is the only place that knows of [CLS].
        """
        x = F.embedding(ids, self.wte)
        if self.config.cls_token_id is None:
            return x.to(self.dtype)
        is_cls = ids.eq(self.config.cls_token_id)
        if self.cls_embedding is not None:
            x = torch.where(is_cls.unsqueeze(-1), self.cls_embedding, x)
        if lora.replaces_cls:
            x = lora.replace_cls_(is_cls, x)
        return x.to(self.dtype)


def _attention(
    layer: int, block: BlockWeights, x: Tensor, normed: Tensor, operators: PartOperators
) -> Tensor:
    """x + the attention of `normed`; x may be changed in place."""
    qkv = operators.add_lora((layer, "attn.lora_qkv"), normed, block.attn_c_attn(normed))  # (N, 3C)
    y = operators.attention(qkv)  # (N, C)
    return operators.add_lora((layer, "attn.lora_out"), y, block.attn_c_proj.add_to(x, y))


def _mlp(
    layer: int, block: BlockWeights, x: Tensor, normed: Tensor, operators: PartOperators
) -> Tensor:
    """x + the MLP of `normed`; x may be changed in place."""
    h = operators.add_lora_gelu((layer, "mlp.lora_fc"), normed, block.mlp_c_fc(normed))  # (N, 4C)
    return operators.add_lora((layer, "mlp.lora_proj"), h, block.mlp_c_proj.add_to(x, h))
