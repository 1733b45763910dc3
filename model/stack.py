"""Stack: all layers of a part in one compiled call, on CPUs with AMX (cpu/stack.h).

Between layers Python's lock is not needed, so that a busy event loop does not hold the forward up.
"""

import ctypes
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import LORA_SITES
from model.layers import LN_EPS
from model.lora import AdapterWeights, LoraBatch
from model.packed import PackedBatch

SITES = list(LORA_SITES)  # in the order of a layer's matrices
BLOCK_ROWS = 16
# Rows multiplied for each that is there, at most; beyond it oneDNN, which knows no segments, is the
# faster: of 2,048 tokens it took 0.8 of the tiles' time at 1.9 rows each, and 1.3 of it at 1.0.
MOST_WASTE = 1.5
Pointers = NDArray[np.int64]
WIDTH = 32  # a panel's outputs, and what is multiplied at a time: n_embd is a multiple of it


class _Trunk(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("matrices", ctypes.c_void_p),
    ]


class _Part(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("real", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("row_starts", ctypes.c_void_p),
        ("row_lengths", ctypes.c_void_p),
        ("segments", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("norms", ctypes.c_void_p),
        ("lora", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
    ]


class Panels:
    """A linear layer's weight (out, in), bfloat16, as tiles take it, and its bias (out,)."""

    def __init__(self, compiled: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> None:
        out, into = weight.shape
        self.weight = torch.empty(out // WIDTH, into // WIDTH, 2, 16, 32, dtype=torch.bfloat16)
        self.bias = bias
        compiled.trunkline_lay_panels(address(weight), into, out, self.weight.data_ptr())


class Stack:
    """The layers of a trunk."""

    def __init__(
        self,
        compiled: ctypes.CDLL,
        heads: int,
        rotary: tuple[Tensor, Tensor],
        matrices: Sequence[Sequence[Panels]],
        norms: Mapping[str, tuple[Tensor, Tensor | None]],
    ) -> None:
        """rotary: cos and sin (positions, head_dim / 2) float32; matrices: c_attn, c_proj, c_fc,
        c_proj of every layer; norms: ln_1 and ln_2 of every layer, then ln_f, by their names."""
        self.compiled = compiled
        self._kept_alive = rotary, matrices, norms
        self._names = list(norms)
        self._norms = np.array([_pair(pair) for pair in norms.values()], np.int64)  # (2 L + 1, 2)
        self._matrices = np.array(
            [[_pair((m.weight, m.bias)) for m in layer] for layer in matrices], np.int64
        )  # (L, 4, 2)
        self._no_lora = np.zeros((len(matrices), len(SITES), 3), np.int64)
        self._lora: WeakKeyDictionary[AdapterWeights, Pointers] = WeakKeyDictionary()
        cos, sin = rotary
        self._trunk = _Trunk(
            len(matrices),
            next(iter(norms.values()))[0].shape[0],
            heads,
            2 * cos.shape[1],
            cos.data_ptr(),
            sin.data_ptr(),
            self._matrices.ctypes.data,
        )

    @staticmethod
    def pays(lora: LoraBatch) -> bool:
        """Whether segments are long enough: each is multiplied in blocks of 16 rows of its own."""
        lengths = [segment.end - segment.start for segment in lora.segments]
        blocks = sum(-(-length // BLOCK_ROWS) for length in lengths)
        return blocks * BLOCK_ROWS <= MOST_WASTE * sum(lengths)

    def run(
        self,
        x: Tensor,
        batch: PackedBatch,
        lora: LoraBatch,
        real: int,
        kept: Mapping[int, Tensor],
        steps: "ctypes.c_int64",
    ) -> None:
        """x (N, C) through all layers, in place; N at least 16.

        The states of the first `real` tokens go to `kept` (real, C), by layer; 0 is after ln_f.
        `steps` grows with every layer. Raises MemoryError.
        """
        adapters = [segment.adapter for segment in lora.segments]
        row_starts, row_lengths = _array(batch.starts), _array(batch.lengths)
        starts = _array([segment.start for segment in lora.segments])
        ends = _array([segment.end for segment in lora.segments])
        norms, pointers = self._norms_of(adapters), self._lora_of(adapters)
        layers = self._trunk.layers + 1
        to = _array([address(kept[layer]) if layer in kept else 0 for layer in range(layers)])
        part = _Part(
            x.shape[0],
            real,
            len(row_starts),
            row_starts.ctypes.data,
            row_lengths.ctypes.data,
            len(adapters),
            starts.ctypes.data,
            ends.ctypes.data,
            norms.ctypes.data,
            pointers.ctypes.data,
            to.ctypes.data,
        )
        failed = self.compiled.trunkline_stack(
            ctypes.byref(self._trunk), ctypes.byref(part), address(x), LN_EPS, ctypes.byref(steps)
        )
        if failed:
            raise MemoryError("no memory for a part's scratch")

    def _norms_of(self, adapters: Sequence[AdapterWeights | None]) -> Pointers:
        """(2 L + 1, segments, 2): an adapter's own where it has them."""
        norms = np.repeat(self._norms[:, None], len(adapters), axis=1)
        for segment, adapter in enumerate(adapters):
            for name, pair in (adapter.norms if adapter else {}).items():
                norms[self._names.index(name), segment] = _pair(pair)
        return norms

    def _lora_of(self, adapters: Sequence[AdapterWeights | None]) -> Pointers:
        """(L, 4, 3, segments): address of A, of B, and the rank; zeros without LoRA."""
        pointers = np.stack([self._own_lora(adapter) for adapter in adapters], axis=-1)
        return np.ascontiguousarray(pointers)

    def _own_lora(self, adapter: AdapterWeights | None) -> Pointers:
        """(L, 4, 3), remembered as long as the adapter is resident."""
        if adapter is None:
            return self._no_lora
        own = self._lora.get(adapter)
        if own is None:
            own = self._no_lora.copy()
            for (layer, site), (a, b) in adapter.lora.items():
                own[layer, SITES.index(site)] = address(a), address(b), a.shape[0]
            self._lora[adapter] = own
        return own


def address(tensor: Tensor) -> int:
    """Of a contiguous bfloat16 tensor. Raises ValueError for another."""
    if not tensor.is_contiguous() or tensor.dtype != torch.bfloat16:
        raise ValueError(f"a contiguous bfloat16 tensor was expected, not {tensor.dtype}")
    return tensor.data_ptr()


def _pair(pair: tuple[Tensor, Tensor | None]) -> tuple[int, int]:
    weight, bias = pair
    return address(weight), 0 if bias is None else address(bias)


def _array(values: Sequence[int]) -> Pointers:
    return np.array(values, np.int64)
