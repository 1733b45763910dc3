"""Every rule of an adapter set against its backbone, and what keeps them."""

import dataclasses

import pytest
import torch
from bad_files import QKV, SET_FAULTS, WIDTH, A, B, set_bytes, set_faults
from conftest import TINY

from adapters.errors import Invalid
from adapters.format import parse_adapter, parse_header
from adapters.validate import MAX_LABELS, Manifest, validate
from model.config import GPTConfig

DIGEST = "sha256:" + "1" * 64
FAULTS = set_faults(DIGEST)


def manifest_of(
    file: bytes,
    config: GPTConfig = TINY,
    dtype: torch.dtype = torch.float32,
    max_rank: int = 64,
) -> Manifest:
    return validate(parse_adapter(bytearray(file)), config, DIGEST, dtype, max_rank)


def reason_of(file: bytes, **options: object) -> str:
    with pytest.raises(Invalid) as caught:
        manifest_of(file, **options)
    reason: str = caught.value.details["reason"]
    return reason


@pytest.mark.parametrize("fault", SET_FAULTS)
def test_a_set_the_backbone_cannot_apply_is_refused_with_its_reason(fault: str) -> None:
    file, reason = FAULTS[fault]
    assert reason_of(file) == reason


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("\N{PILE OF POO}" * 50_000, None),
        ("zzzz<script>\x1b[31m", None),
        (f"_orig_mod.{A}", A),
        (A.replace(".A.", ".lora_A."), A),
        ("transformer.ln_f.weights", "transformer.ln_f.weight"),
        ("classifier.weights", "classifier.weight"),
    ],
)
def test_an_unknown_tensor_is_told_by_its_place_and_the_nearest_name_never_by_its_own(
    name: str, nearest: str | None
) -> None:
    file = bytearray(set_bytes(DIGEST, {name: torch.ones(1)}))
    with pytest.raises(Invalid) as caught:
        validate(parse_adapter(file), TINY, DIGEST, torch.float32)
    place = list(parse_header(file).tensors).index(name) + 1
    assert caught.value.details == {"reason": "unknown_tensor", "tensor": place}
    assert caught.value.message.startswith(f"tensor {place} of the header has a name ")
    assert name not in caught.value.message
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200
    if nearest is None:
        assert "nearest" not in caught.value.message
    else:
        assert caught.value.message.endswith(f"the nearest known is {nearest}")


def test_a_whole_set_is_told_as_what_it_changes() -> None:
    heads = {"critic": True, "classes": 3, "sequence": True, "cls": True}
    file = set_bytes(DIGEST, {"calibration": torch.ones(100)}, norms=True, **heads)
    sites = dict.fromkeys(("attn.lora_qkv", "attn.lora_out", "mlp.lora_fc", "mlp.lora_proj"), 4)
    manifest = manifest_of(file)
    assert manifest == Manifest(
        ranks={0: sites, 1: sites},
        norms=["transformer.h.0.ln_1", "transformer.ln_f"],
        critic=True,
        calibration=True,
        labels=("label-0", "label-1", "label-2"),
        sequence_head=True,
        cls_embedding=True,
    )
    assert manifest.rank == 4
    assert Manifest.from_dict(manifest.to_dict()) == manifest


def test_a_manifest_of_another_version_of_the_program_is_read() -> None:
    """A registry outlives the program: old records lack fields, newer ones have more."""
    stored = Manifest(critic=True).to_dict()
    old = {n: v for n, v in stored.items() if n not in ("sequence_head", "cls_embedding")}
    assert Manifest.from_dict(old) == Manifest(critic=True)
    assert Manifest.from_dict(stored | {"of_a_later_version": 1}) == Manifest(critic=True)


def test_a_cls_embedding_needs_a_trunk_with_a_cls_token() -> None:
    config = dataclasses.replace(TINY, cls_token_id=None)
    assert reason_of(set_bytes(DIGEST, cls=True), config=config) == "no_cls_token"
    assert manifest_of(set_bytes(DIGEST, sequence=True), config).sequence_head
    assert manifest_of(set_bytes(DIGEST, cls=True)).cls_embedding


def test_any_subset_of_sites_with_any_ranks_is_taken() -> None:
    ranks = {(0, "mlp.lora_fc"): 1, (1, "attn.lora_out"): 64}
    manifest = manifest_of(set_bytes(DIGEST, ranks=ranks))
    assert manifest.ranks == {0: {"mlp.lora_fc": 1}, 1: {"attn.lora_out": 64}}
    assert manifest.rank == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_dtype_is_taken(dtype: torch.dtype) -> None:
    a, b = torch.ones(4, WIDTH, dtype=dtype), torch.ones(3 * WIDTH, 4, dtype=dtype)
    assert manifest_of(set_bytes(DIGEST, {A: a, B: b})).ranks[0]["attn.lora_qkv"] == 4


def test_the_largest_rank_is_the_configured_one() -> None:
    file = set_bytes(DIGEST, ranks=9)
    assert manifest_of(file, max_rank=9).rank == 9
    assert reason_of(file, max_rank=8) == "rank"


def test_heads_alone_and_layer_norms_alone_are_sets() -> None:
    assert manifest_of(set_bytes(DIGEST, ranks={}, critic=True)).critic
    assert manifest_of(set_bytes(DIGEST, ranks={}, classes=2)).labels == ("label-0", "label-1")
    assert manifest_of(set_bytes(DIGEST, ranks={}, norms=True)).norms
    assert manifest_of(set_bytes(DIGEST, ranks={}, sequence=True)).sequence_head
    assert manifest_of(set_bytes(DIGEST, ranks={}, cls=True)).cls_embedding


def test_a_classifier_without_a_bias_is_taken_and_labels_have_a_bound() -> None:
    file = set_bytes(DIGEST, {"classifier.bias": None}, classes=3)
    assert len(manifest_of(file).labels) == 3
    assert reason_of(set_bytes(DIGEST, classes=MAX_LABELS + 1, ranks={})) == "labels"


@pytest.mark.parametrize("key", ["base_digest", "format"])
def test_what_the_metadata_may_leave_out(key: str) -> None:
    assert manifest_of(set_bytes(DIGEST, metadata={key: None})).rank == 4


def test_the_refusal_of_another_backbone_s_adapter_names_both() -> None:
    other = "sha256:" + "ab" * 32
    with pytest.raises(Invalid) as refused:
        manifest_of(set_bytes(DIGEST, metadata={"base_digest": other}))
    assert "'sha256:abababababab'; this one is" in str(refused.value)
    assert repr(DIGEST[:19]) in str(refused.value)


@pytest.mark.parametrize("alpha", ["8", "8.0", "1e-3", "0.5"])
def test_alpha_is_any_number_above_0(alpha: str) -> None:
    assert manifest_of(set_bytes(DIGEST, metadata={"lora_alpha": alpha})).rank == 4


@pytest.mark.parametrize("name", [A, "transformer.ln_f.bias", "critic_head.weight"])
def test_what_overflows_in_the_serving_dtype_is_refused_there_alone(name: str) -> None:
    adapter = parse_adapter(bytearray(set_bytes(DIGEST, norms=True, critic=True)))
    large = adapter.tensors[name].clone()
    large.view(-1)[0] = 3.4e38  # rounds to infinity as bfloat16
    file = set_bytes(DIGEST, {name: large}, norms=True, critic=True)
    assert manifest_of(file, dtype=torch.float32).rank == 4
    assert reason_of(file, dtype=torch.bfloat16) == "not_finite"


def test_a_backbone_without_biases_knows_no_layer_norm_bias() -> None:
    config = dataclasses.replace(TINY, bias=False)
    weight, bias = {"transformer.ln_f.weight": torch.ones(WIDTH)}, "transformer.ln_f.bias"
    assert manifest_of(set_bytes(DIGEST, weight), config).norms == ["transformer.ln_f"]
    both = weight | {bias: torch.ones(WIDTH)}
    assert reason_of(set_bytes(DIGEST, both), config=config) == "unknown_tensor"


def test_the_sentence_names_the_tensor_and_what_it_must_be() -> None:
    with pytest.raises(Invalid, match=rf"{QKV}.A.weight must be \(rank, {WIDTH}\)"):
        manifest_of(set_bytes(DIGEST, {A: torch.ones(4, 3)}))
