"""How far apart two adapter sets are: at each place, the norm of what they change and between."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.format import AdapterSet
from model.heads import SEQUENCE_HEAD


@dataclass(frozen=True)
class Distance:
    """Frobenius norms at one place, as transformer.h.3.attn.lora_qkv, transformer.ln_f, classifier.

    Of LoRA's update scaling * B @ A; of a LayerNorm, a head or the CLS embedding, of what it is
    beyond the backbone's own, or beyond 0 where the backbone has none. A sequence head counts as
    the map that it is, A * W and B, since only the product of A and W matters.
    """

    key: str
    a: float  # 0 where the first set changes nothing here
    b: float
    between: float | None  # of the difference; None for classifiers of unlike labels


def distances(a: AdapterSet, b: AdapterSet, base: Mapping[str, Tensor]) -> list[Distance]:
    """Of every place that one of them changes, in the names' order; computed in float64.

    `base` has the backbone's LayerNorms and heads by their names in an adapter. Both sets must
    have passed validate() for that backbone.
    """
    places: dict[str, set[str]] = {}  # place -> its tensors' names
    for name in sorted({*a.tensors, *b.tensors}):
        places.setdefault(_place(name), set()).add(name)
    return [
        _lora(place, a, b) if ".lora_" in place else _replaced(place, sorted(names), a, b, base)
        for place, names in places.items()
    ]


def _place(name: str) -> str:
    """transformer.h.0.attn.lora_qkv.A.weight -> transformer.h.0.attn.lora_qkv"""
    if name in SEQUENCE_HEAD:
        return "sequence_head"
    return name.removesuffix(".weight").removesuffix(".bias").removesuffix(".A").removesuffix(".B")


def _lora(place: str, a: AdapterSet, b: AdapterSet) -> Distance:
    """Of two products U_a D_a and U_b D_b, (M, r) @ (r, N), neither of which is made.

    With [U_a U_b] = Q S and [D_a^T D_b^T] = P T, Q and P orthonormal, the norms are those of
    S_a T_a^T, S_b T_b^T and their difference, no larger than (2 r, 2 r). Gram matrices would be
    cheaper, but would lose a small difference of large updates in the rounding of its square.
    """
    sides = [_factors(place, each) for each in (a, b)]
    pairs = [side for side in sides if side]
    ranks = [side[0].shape[1] if side else 0 for side in sides]
    s = torch.linalg.qr(torch.cat([up for up, _ in pairs], dim=1), mode="r").R.split(ranks, 1)
    t = torch.linalg.qr(torch.cat([down for _, down in pairs]).t(), mode="r").R.split(ranks, 1)
    first, second = (x @ y.t() for x, y in zip(s, t, strict=True))  # zeros for rank 0
    same = len(pairs) == 2 and all(map(torch.equal, *pairs))  # else rounding leaves some 1e-17
    between = 0.0 if same else _norm([first - second])
    return Distance(place, _norm([first]), _norm([second]), between)


def _factors(place: str, adapter: AdapterSet) -> tuple[Tensor, Tensor] | None:
    """scaling * B (M, r) and A (r, N), where the set has them."""
    down = adapter.tensors.get(f"{place}.A.weight")
    if down is None:
        return None
    up = adapter.tensors[f"{place}.B.weight"].double() * adapter.scaling(down.shape[0])
    return up, down.double()


def _replaced(
    place: str, names: list[str], a: AdapterSet, b: AdapterSet, base: Mapping[str, Tensor]
) -> Distance:
    """The distances of LayerNorms, heads and the CLS embedding, which replace the backbone's."""
    first, second = ([_change(name, each, base) for name in names] for each in (a, b))
    if place == "sequence_head":
        first, second = ([_sequence_change(each, base)] for each in (a, b))
    alike = place != "classifier" or not (a.labels and b.labels) or a.labels == b.labels
    pairs = zip(first, second, strict=True)
    between = _norm([one - other for one, other in pairs]) if alike else None
    return Distance(place, _norm(first), _norm(second), between)


def _change(name: str, adapter: AdapterSet, base: Mapping[str, Tensor]) -> Tensor:
    """What stands in the backbone's place, beyond it; the scalar 0 where nothing does."""
    if name not in adapter.tensors:
        return torch.zeros((), dtype=torch.float64)
    own = base.get(name)
    value = adapter.tensors[name].double()
    return value if own is None else value - own.double()


def _sequence_change(adapter: AdapterSet, base: Mapping[str, Tensor]) -> Tensor:
    """(C + 1,) A * W and B beyond the backbone's; the scalar 0 for a set without the head."""
    if SEQUENCE_HEAD[0] not in adapter.tensors:
        return torch.zeros((), dtype=torch.float64)
    own = _sequence_map(adapter.tensors)
    return own - _sequence_map(base) if SEQUENCE_HEAD[0] in base else own


def _sequence_map(tensors: Mapping[str, Tensor]) -> Tensor:
    weight, a, b = (tensors[name].double() for name in SEQUENCE_HEAD)
    return torch.cat((a * weight[0], b))


def _norm(parts: list[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in parts))
