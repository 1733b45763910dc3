"""The compiled operators of cpu/kernels.cpp: bfloat16, on CPUs with AVX-512's arithmetic of it.

They are built when the package is installed, where there is a C++ compiler; without them, and on
other devices and in other dtypes, model.operators.TorchOperators does the same.
"""

import ctypes
import logging
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from model.config import GPTConfig
from model.layers import LN_EPS, rotary_table
from model.lora import LoraBatch, Site
from model.operators import BF16_ROWS
from model.packed import PackedBatch
from model.stack import address

LIBRARY = "model._kernels"
HEAD_DIMS = (32, 64, 128)
LAYOUT = 1  # of what is passed: kernels.cpp has the same number, and both change together
WIDTH = 32  # what the operators take at a time: n_embd is a multiple of it

log = logging.getLogger("trunkline.model")

_pointer, _int = ctypes.c_void_p, ctypes.c_int64
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "trunkline_layout": (),
    "trunkline_permit_tiles": (),
    "trunkline_lay_panels": (_pointer, _int, _int, _pointer),
    "trunkline_stack": (_pointer, _pointer, _pointer, ctypes.c_float, _pointer),
    "trunkline_norm": (
        *(_pointer, _pointer, _int, ctypes.c_float, _int),
        *(_pointer, _pointer, _pointer, _pointer),
    ),
    "trunkline_attention": (
        *(_pointer, _pointer, _pointer, _pointer, _pointer),
        *(_int, _int, _int, ctypes.c_int, _pointer),
    ),
    "trunkline_lora": (
        *(_pointer, _int, _pointer, _int, _int),
        *(_pointer, _pointer, _pointer, _pointer, _pointer, ctypes.c_int),
    ),
    "trunkline_linear8": (
        *(_pointer, _int, _int, _int),
        *(_pointer, _pointer, _pointer, _pointer, ctypes.c_int, _pointer),
    ),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built or this processor lacks its arithmetic.

    A call into it lets other Python threads run.
    """
    spec = find_spec(LIBRARY)
    capabilities = torch.cpu.get_capabilities()
    able = capabilities.get("avx512_bf16") and capabilities.get("avx512_vnni")
    if spec is None or spec.origin is None or not able:
        return None
    try:
        loaded = ctypes.CDLL(spec.origin)
        for name, arguments in SIGNATURES.items():
            getattr(loaded, name).argtypes = arguments
    except (OSError, AttributeError) as error:  # AttributeError: built from an older source
        log.warning("the compiled operators can't be loaded, torch's are used: %s", error)
        return None
    if loaded.trunkline_layout() != LAYOUT:
        log.warning(
            "the compiled operators are of another version, torch's are used: install again"
        )
        return None
    return loaded


@cache
def has_tiles() -> bool:
    """Whether this processor has AMX for bfloat16 and the kernel lets us use it."""
    compiled = library()
    able = torch.cpu.get_capabilities().get("amx_bf16")
    return bool(compiled and able and compiled.trunkline_permit_tiles())


class CompiledOperators:
    """model.operators.Operators by the compiled library, each call on the thread that makes it.

    With `tiles` attention is multiplied by AMX, and a Stack can run all layers.
    """

    name, align, align_adapters = "compiled", BF16_ROWS, False

    def __init__(self, compiled: ctypes.CDLL, config: GPTConfig, tiles: bool) -> None:
        self.compiled, self.tiles = compiled, tiles
        self.heads, self.head_dim = config.n_head, config.head_dim
        cos, sin = rotary_table(config.block_size, config.head_dim)
        half = config.head_dim // 2  # the other half is the same
        self.cos, self.sin = cos[:, :half].contiguous(), sin[:, :half].contiguous()

    @classmethod
    def where_possible(
        cls, config: GPTConfig, dtype: torch.dtype, device: torch.device, tiles: bool = True
    ) -> "CompiledOperators | None":
        fits = config.head_dim in HEAD_DIMS and config.n_embd % WIDTH == 0
        if device.type != "cpu" or dtype != torch.bfloat16 or not fits:
            return None
        compiled = library()
        return None if compiled is None else cls(compiled, config, tiles and has_tiles())

    def of(self, batch: PackedBatch, lora: LoraBatch) -> "CompiledPart":
        return CompiledPart(self, batch, lora)


class CompiledPart:
    def __init__(self, operators: CompiledOperators, batch: PackedBatch, lora: LoraBatch) -> None:
        self.operators, self.batch = operators, batch
        self.row_starts, self.row_lengths = _integers(batch.starts), _integers(batch.lengths)
        self.adapters = [s.adapter for s in lora.segments]
        self.starts = _integers(s.start for s in lora.segments)
        self.ends = _integers(s.end for s in lora.segments)

    def norm(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.empty_like(x)
        own = [None if adapter is None else adapter.norms.get(name) for adapter in self.adapters]
        pairs = [pair or (weight, bias) for pair in own]
        self.operators.compiled.trunkline_norm(
            address(x),
            address(y),
            x.shape[1],
            LN_EPS,
            len(pairs),
            self.starts,
            self.ends,
            _integers(address(w) for w, _ in pairs),
            _integers(0 if b is None else address(b) for _, b in pairs),
        )
        return y

    def attention(self, qkv: Tensor) -> Tensor:
        operators = self.operators
        shape = (qkv.shape[0], operators.heads * operators.head_dim)
        # gaps go through every operator too: zeros keep them finite
        out = (torch.zeros if self.batch.gaps else torch.empty)(shape, dtype=qkv.dtype)
        failed = operators.compiled.trunkline_attention(
            address(qkv),
            operators.cos.data_ptr(),
            operators.sin.data_ptr(),
            self.row_starts,
            self.row_lengths,
            len(self.row_lengths),
            operators.heads,
            operators.head_dim,
            operators.tiles,
            address(out),
        )
        if failed:
            raise MemoryError("no memory for an attention's scratch")
        return out

    def add_lora(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return self._lora(site, x, y, gelu=False)

    def add_lora_gelu(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return self._lora(site, x, y, gelu=True)

    def _lora(self, site: Site, x: Tensor, y: Tensor, gelu: bool) -> Tensor:
        own = [None if adapter is None else adapter.lora.get(site) for adapter in self.adapters]
        if not gelu and not any(own):
            return y
        failed = self.operators.compiled.trunkline_lora(
            address(x),
            x.shape[1],
            address(y),
            y.shape[1],
            len(own),
            self.starts,
            self.ends,
            _integers(0 if pair is None else address(pair[0]) for pair in own),
            _integers(0 if pair is None else address(pair[1]) for pair in own),
            _integers(0 if pair is None else pair[0].shape[0] for pair in own),
            gelu,
        )
        if failed:
            raise MemoryError("no memory for LoRA's scratch")
        return y


def _integers(values: Iterable[int]) -> "ctypes.Array[ctypes.c_int64]":
    values = list(values)
    return (ctypes.c_int64 * len(values))(*values)
