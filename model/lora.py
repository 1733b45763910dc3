"""Mixed-batch LoRA: every adapter's own matrices on its own tokens of one packed batch.

An adapter is keyed by (layer, site), never by module: the layers share their matrices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from model.layers import LN_EPS

Site = tuple[int, str]  # (layer, name in LORA_SITES)


@dataclass(frozen=True, eq=False)
class Classifier:
    weight: Tensor  # (K, C) float32
    bias: Tensor | None  # (K,) float32
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SequenceHead:
    """sigmoid(A * Wx + B) of a row's first token: weight (C,), a (1,), b (1,), all float32."""

    weight: Tensor
    a: Tensor
    b: Tensor


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """One adapter set on the device, ready to be applied.

    `lora` has, for every (layer, site) the set changes, A (r, in) and B transposed (r, out) with
    the scaling already in it. `norms` has the LayerNorms it replaces, under their state-dict names
    without `.weight`.
    """

    lora: Mapping[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    norms: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    critic: Tensor | None = None  # (C,) float32
    calibration: Tensor | None = None  # (100,) float32, on the CPU
    classifier: Classifier | None = None
    sequence_head: SequenceHead | None = None
    cls_embedding: Tensor | None = None  # (C,) float32, in place of the trunk's at [CLS]


@dataclass(frozen=True)
class Segment:
    """Tokens start..end of a packed batch, all of one adapter; None is the backbone alone."""

    start: int
    end: int
    adapter: AdapterWeights | None


class LoraBatch:
    """Which adapter each token of a packed batch belongs to: its segments, end to end."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        self._runs = _runs_of(self.segments)
        self._norms = {
            name for s in self.segments if s.adapter is not None for name in s.adapter.norms
        }
        self.replaces_cls = any(
            s.adapter is not None and s.adapter.cls_embedding is not None for s in self.segments
        )

    @classmethod
    def of_rows(
        cls, lengths: Sequence[int], adapters: Sequence[AdapterWeights | None]
    ) -> "LoraBatch":
        """One adapter a row; neighbouring rows of the same one become one segment."""
        segments: list[Segment] = []
        start = 0
        for length, adapter in zip(lengths, adapters, strict=True):
            if segments and segments[-1].adapter is adapter:
                start_before = segments.pop().start
            else:
                start_before = start
            segments.append(Segment(start_before, start + length, adapter))
            start += length
        return cls(segments)

    def between(self, start: int, end: int) -> "LoraBatch":
        """The same for tokens start..end alone, counted from start."""
        return LoraBatch(
            [
                Segment(max(s.start, start) - start, min(s.end, end) - start, s.adapter)
                for s in self.segments
                if s.start < end and s.end > start
            ]
        )

    def add_(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """y[s] += (x[s] A_s^T) B_s^T for every segment s whose adapter changes this site.

        x (N, in), y (N, out), changed in place. Other segments' rows are never touched, not even
        multiplied by 0: 0 * NaN would carry one adapter's NaN into another's rows.
        """
        for start, length, adapters in self._runs:
            pairs = [adapter.lora.get(site) for adapter in adapters]
            whole = [pair for pair in pairs if pair is not None]
            end = start + length * len(pairs)
            if 1 < len(pairs) == len(whole) and len({a.shape for a, _ in whole}) == 1:
                _add_together(whole, x[start:end], y[start:end])
            else:
                for pair, begin in zip(pairs, range(start, end, length), strict=True):
                    if pair is not None:
                        a, b_t = pair
                        segment = slice(begin, begin + length)
                        y[segment].addmm_(x[segment] @ a.t(), b_t)
        return y

    def replace_cls_(self, is_cls: Tensor, x: Tensor) -> Tensor:
        """x (N, C), in place: the adapter's own CLS embedding at its segments' [CLS] tokens.

        is_cls (N,) says which tokens are [CLS]. Other tokens keep their bits.
        """
        for s in self.segments:
            own = s.adapter.cls_embedding if s.adapter is not None else None
            if own is not None:
                segment = slice(s.start, s.end)
                x[segment] = torch.where(is_cls[segment, None], own, x[segment])
        return x

    def norm(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """LayerNorm of x (N, C), each segment under its adapter's own weights where it has them."""
        if name not in self._norms:
            return F.layer_norm(x, weight.shape, weight, bias, LN_EPS)
        out = torch.empty_like(x)
        for s in self.segments:
            own = s.adapter.norms.get(name) if s.adapter is not None else None
            w, b = own if own is not None else (weight, bias)
            out[s.start : s.end] = F.layer_norm(x[s.start : s.end], w.shape, w, b, LN_EPS)
        return out


def _add_together(pairs: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> None:
    """add_ of neighbouring segments of one length and adapters of one rank, in two batched calls.

    x (G n, in), y (G n, out); each of the G pairs is A (r, in) and B transposed (r, out).
    """
    a, b_t = (torch.stack(matrices) for matrices in zip(*pairs, strict=True))
    segments = (len(pairs), x.shape[0] // len(pairs), -1)
    low = torch.bmm(x.view(segments), a.transpose(1, 2))  # (G, n, r)
    y.view(segments).baddbmm_(low, b_t)


def _runs_of(segments: Sequence[Segment]) -> list[tuple[int, int, list[AdapterWeights]]]:
    """(start, tokens a segment, adapters) of neighbouring segments of one length, None left out."""
    runs: list[tuple[int, int, list[AdapterWeights]]] = []
    for s in segments:
        if s.adapter is None:
            continue
        length = s.end - s.start
        if runs:
            start, before, adapters = runs[-1]
            if before == length and start + before * len(adapters) == s.start:
                adapters.append(s.adapter)
                continue
        runs.append((s.start, length, [s.adapter]))
    return runs
