"""How far two sets are apart, held against the updates made in full."""

import math

import pytest
import torch
from bad_files import set_bytes
from conftest import TINY, random_adapter, random_gpt
from torch import Tensor

from adapters.difference import Distance, distances
from adapters.format import AdapterSet, parse_adapter
from model.checkpoint import backbone_tensors

BASE = backbone_tensors(TINY, random_gpt(TINY, 5).state_dict()) | {"calibration": torch.rand(100)}
SITE = "transformer.h.1.mlp.lora_fc"
A, B = f"{SITE}.A.weight", f"{SITE}.B.weight"


def set_of(changes: dict[str, Tensor] | None = None, **options: object) -> AdapterSet:
    return parse_adapter(bytearray(set_bytes(None, changes, **options)))


def apart(a: AdapterSet, b: AdapterSet) -> dict[str, Distance]:
    return {found.key: found for found in distances(a, b, BASE)}


def update(adapter: AdapterSet, site: str) -> Tensor:
    """scaling * B @ A in full, 0 where there is none."""
    down = adapter.tensors.get(f"{site}.A.weight")
    if down is None:
        return torch.zeros((), dtype=torch.float64)
    product = adapter.tensors[f"{site}.B.weight"].double() @ down.double()
    return product * adapter.scaling(len(down))


@pytest.mark.parametrize("rank", [1, 3, 16, 40])  # 40: of more than the matrices' 16 columns
def test_of_lora_it_is_the_norm_of_the_products_whatever_rank_and_scaling(rank: int) -> None:
    few = {(0, "attn.lora_qkv"): rank, (1, "mlp.lora_fc"): 2}
    a = set_of(seed=1, ranks=few, metadata={"lora_alpha": "3"})
    b = set_of(seed=2, ranks=5, metadata={"use_rslora": "true"})
    found = apart(a, b)
    assert len(found) == 8
    for site, distance in found.items():
        first, second = update(a, site), update(b, site)
        assert distance.a == pytest.approx(float(first.norm()), rel=1e-12)
        assert distance.b == pytest.approx(float(second.norm()), rel=1e-12)
        assert distance.between == pytest.approx(float((first - second).norm()), rel=1e-12)


def test_a_small_difference_of_large_updates_is_not_lost() -> None:
    a = set_of(seed=3, ranks={(1, "mlp.lora_fc"): 4})
    moved = a.tensors[B].clone()
    moved[0, 0] = torch.nextafter(moved[0, 0], torch.tensor(9.0))
    b = set_of({B: moved}, seed=3, ranks={(1, "mlp.lora_fc"): 4})
    step = float((moved.double() - a.tensors[B].double())[0, 0]) * a.scaling(4)
    exact = step * float(a.tensors[A][0].double().norm())
    between = apart(a, b)[SITE].between
    assert exact < 1e-7 * apart(a, b)[SITE].a
    assert between == pytest.approx(exact, rel=1e-5)


def test_the_same_weights_are_0_apart_and_a_swap_only_swaps_the_sides() -> None:
    a = set_of(seed=4, norms=True, critic=True, classes=3)
    b = set_of(seed=5, norms=True, critic=True, classes=3)
    assert {found.between for found in apart(a, a).values()} == {0.0}
    there, back = apart(a, b), apart(b, a)
    assert list(there) == list(back) == sorted(there)
    for key, found in there.items():
        assert (found.a, found.b) == pytest.approx((back[key].b, back[key].a), rel=1e-12)
        assert found.between == pytest.approx(back[key].between, rel=1e-12)


def test_layer_norms_and_heads_count_from_what_the_trunk_has_there() -> None:
    tensors = {"calibration": torch.rand(100)}
    a = set_of(tensors, seed=6, ranks={}, norms=True, critic=True)
    b = set_of(seed=7, ranks={(0, "attn.lora_out"): 1})
    found = apart(a, b)
    for key, names in {
        "transformer.ln_f": ("transformer.ln_f.weight", "transformer.ln_f.bias"),
        "critic_head": ("critic_head.weight",),
        "calibration": ("calibration",),
    }.items():
        moved = torch.cat([(a.tensors[n].double() - BASE[n].double()).flatten() for n in names])
        assert found[key].a == found[key].between == pytest.approx(float(moved.norm()), rel=1e-12)
        assert found[key].b == 0
    of_none = {each.key: each for each in distances(a, b, {})}["critic_head"]
    assert of_none.a == pytest.approx(float(a.tensors["critic_head.weight"].double().norm()))


def test_a_sequence_head_counts_as_the_map_that_it_is() -> None:
    """A * W and B: the same head with W twice and A half as large is no other head."""
    a = set_of(seed=6, ranks={}, sequence=True, cls=True)
    weight, scale = "sequence_head.base_predictor.weight", "sequence_head.A"
    same = {weight: a.tensors[weight] * 2, scale: a.tensors[scale] / 2}
    b = set_of(same, seed=6, ranks={}, sequence=True, cls=True)
    found = apart(a, b)
    assert set(found) == {"sequence_head", "cls_embedding"}
    assert found["sequence_head"].between == pytest.approx(0.0, abs=1e-12)
    own, trunk = (
        torch.cat((x[scale].double() * x[weight][0].double(), x["sequence_head.B"].double()))
        for x in (a.tensors, BASE)
    )
    assert found["sequence_head"].a == pytest.approx(float((own - trunk).norm()), rel=1e-12)
    alone = apart(a, set_of(seed=1, ranks=1))
    assert alone["sequence_head"].between == alone["sequence_head"].a
    moved = a.tensors["cls_embedding"].double() - BASE["cls_embedding"].double()
    assert alone["cls_embedding"].a == pytest.approx(float(moved.norm()), rel=1e-12)


def test_classifiers_are_subtracted_where_their_labels_are_the_same() -> None:
    a, b, other = (set_of(seed=s, ranks={}, classes=c) for s, c in ((8, 3), (9, 3), (10, 4)))
    names = ("classifier.weight", "classifier.bias")
    parts = [float((a.tensors[n].double() - b.tensors[n].double()).norm()) for n in names]
    assert apart(a, b)["classifier"].between == pytest.approx(math.hypot(*parts), rel=1e-12)
    assert apart(a, other)["classifier"].between is None
    without = parse_adapter(bytearray(set_bytes(None, {names[1]: None}, ranks={}, classes=3)))
    assert apart(a, without)["classifier"].between is not None
    alone = apart(a, set_of(seed=1, ranks=1))["classifier"]
    assert (alone.a, alone.b) == (alone.between, 0)


def test_stored_dtypes_are_compared_by_their_values() -> None:
    halves = {name: tensor.half() for name, tensor in random_adapter(TINY, 12).items()}
    a, b = set_of(halves, seed=12), set_of({n: t.float() for n, t in halves.items()}, seed=12)
    assert a.digest != b.digest
    assert {found.between for found in apart(a, b).values()} == {0.0}
