"""The serving forward against the reference, model.gpt.GPT in float32."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import KIT, TINY, random_adapter, random_gpt
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import Oracle, served, states_of, under_adapter
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from adapters.format import AdapterSet
from model.checkpoint import backbone_tensors, norm_names, read_backbone
from model.config import LORA_SITES, MAIN_MATRICES, GPTConfig
from model.encoder import FINAL, Encoder
from model.gpt import GPT
from model.heads import TrunkHeads, critic_logits, label_scores, pool, sequence_scores
from model.lora import AdapterWeights, LoraBatch
from model.packed import PackedBatch
from model.parts import parts_of

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},  # against the reference, states of size 1 to 10
    torch.bfloat16: {"cosine": 0.999},  # the least, of a pooled row to float32's
}


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


@dataclass(frozen=True)
class Row:
    ids: Tensor  # (T,)
    adapter: int | None  # of the case's adapters


@dataclass(frozen=True)
class Case:
    gpt: GPT  # the base
    adapters: list[AdapterSet]
    rows: list[Row]

    @property
    def config(self) -> GPTConfig:
        return self.gpt.config

    def references(self) -> dict[int | None, GPT]:
        under = {
            i: under_adapter(self.gpt, a.tensors, a.lora_alpha, a.use_rslora)
            for i, a in enumerate(self.adapters)
        }
        return {None: self.gpt} | under


def lively_gpt(config: GPTConfig, seed: int) -> GPT:
    """Weights so large that attention is far from even and every part of a block matters."""
    gpt = random_gpt(config, seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        gpt.wte.weight.normal_()
    return gpt


def a_config(**fields: object) -> GPTConfig:
    return GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=32, block_size=64, **fields)


@st.composite
def configs(draw: st.DrawFn) -> GPTConfig:
    # Not narrower: the LayerNorm of a few values that are nearly equal magnifies any rounding.
    n_head, head_dim = draw(st.sampled_from([(1, 12), (2, 10), (3, 4), (6, 2), (4, 8)]))
    vocab_size = draw(st.integers(4, 40))
    mask, pad, cls = draw(st.permutations(range(vocab_size)))[:3]
    return GPTConfig(
        block_size=draw(st.integers(1, 40)),
        vocab_size=vocab_size,
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_embd=n_head * head_dim,
        bias=draw(st.booleans()),
        share_main_matrices=draw(st.booleans()),
        mask_token_id=mask,
        pad_token_id=pad,
        cls_token_id=draw(st.sampled_from([cls, None])),
        add_critic_head=draw(st.booleans()),
    )


@st.composite
def adapter_sets(draw: st.DrawFn, config: GPTConfig) -> AdapterSet:
    """Any sites, any ranks, any LayerNorms, any heads, with or without a CLS embedding."""
    sites = [(layer, site) for layer in range(config.n_layer) for site in LORA_SITES]
    rank = st.sampled_from([1, 2, 8, 64]) | st.integers(1, 64)
    ranks = draw(st.dictionaries(st.sampled_from(sites), rank, max_size=len(sites)))
    classes = draw(st.sampled_from([0, 1, 5]))
    seed = draw(st.integers(0, 1 << 30))
    has_cls = config.cls_token_id is not None
    tensors = random_adapter(
        config,
        seed,
        ranks=ranks,
        critic=draw(st.booleans()),
        classes=classes,
        sequence=has_cls and draw(st.booleans()),
        cls=has_cls and draw(st.booleans()),
    )
    for name in draw(st.sets(st.sampled_from(norm_names(config)))):
        tensors[f"{name}.weight"] = 1 + torch.randn(config.n_embd) * 0.3
        if config.bias:
            tensors[f"{name}.bias"] = torch.randn(config.n_embd) * 0.3
    metadata = {
        "lora_alpha": str(draw(st.sampled_from([0.5, 8.0, 16.0]))),
        "use_rslora": draw(st.sampled_from(["true", "false"])),
        "labels": json.dumps([f"label {i}" for i in range(classes)]),
    }
    return AdapterSet(tensors, metadata, "")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    config = draw(configs())
    seed = draw(st.integers(0, 1 << 30))
    adapters = draw(st.lists(adapter_sets(config), max_size=3))
    which = st.sampled_from([None, *range(len(adapters))])
    lengths = st.just(config.block_size) | st.integers(1, config.block_size)
    led = st.booleans()  # by [CLS], where there is one
    plan = draw(st.lists(st.tuples(lengths, which, led), min_size=1, max_size=16))
    torch.manual_seed(seed)
    rows = [Row(torch.randint(config.vocab_size, (n,)), adapter) for n, adapter, _ in plan]
    for row, (_, _, begins_with_cls) in zip(rows, plan, strict=True):
        if begins_with_cls and config.cls_token_id is not None:
            row.ids[0] = config.cls_token_id
    return Case(lively_gpt(config, seed), adapters, rows)


def encoder_of(gpt: GPT, dtype: torch.dtype = torch.float32) -> Encoder:
    return Encoder(gpt.config, backbone_tensors(gpt.config, gpt.state_dict()), dtype)


def packed(rows: Sequence[Tensor]) -> PackedBatch:
    return PackedBatch(torch.cat(list(rows)), [len(row) for row in rows])


def encode(
    encoder: Encoder,
    rows: Sequence[Tensor],
    adapters: Sequence[AdapterWeights | None],
    layer: int = FINAL,
) -> list[Tensor]:
    """The rows' states, (T, C) each, out of one batch."""
    batch = packed(rows)
    lora = LoraBatch.of_rows(batch.lengths, adapters)
    return list(encoder.forward(batch, lora, [layer])[layer].split(batch.lengths))


def weights_for(case: Case) -> list[AdapterWeights | None]:
    """Each row's adapter as the encoder takes it."""
    ready = [served(a, case.config, torch.float32) for a in case.adapters]
    return [None if row.adapter is None else ready[row.adapter] for row in case.rows]


@examples(80)
@given(cases())
def test_every_kept_layer_of_every_row_equals_the_reference(case: Case) -> None:
    batch = packed([row.ids for row in case.rows])
    lora = LoraBatch.of_rows(batch.lengths, weights_for(case))
    layers = [*range(1, case.config.n_layer + 1), FINAL]
    kept = encoder_of(case.gpt).forward(batch, lora, layers)
    references = case.references()
    for number, row in enumerate(case.rows):
        tokens = slice(batch.starts[number], batch.starts[number] + len(row.ids))
        expected = states_of(references[row.adapter], row.ids)
        for layer, state in zip(layers, expected, strict=True):
            assert_close(kept[layer][tokens], state)


@examples(30)
@given(cases())
def test_critic_and_classifier_are_the_adapter_s_own_where_it_has_them(case: Case) -> None:
    weights, references = weights_for(case), case.references()
    batch = packed([row.ids for row in case.rows])
    lora = LoraBatch.of_rows(batch.lengths, weights)
    hidden = encoder_of(case.gpt).forward(batch, lora)[FINAL]
    for number, row in enumerate(case.rows):
        own = weights[number]
        tokens = slice(batch.starts[number], batch.starts[number] + len(row.ids))
        if own is not None and own.critic is not None:
            scores = references[row.adapter].critic_scores(row.ids[None], torch.ones(1, 1))
            assert_close(critic_logits(hidden[tokens], own.critic), scores[0].detach())
        if own is not None and own.classifier is not None:
            tensors = case.adapters[row.adapter or 0].tensors
            mean = states_of(references[row.adapter], row.ids)[-1].mean(0)
            logits = tensors["classifier.weight"] @ mean + tensors["classifier.bias"]
            found = label_scores(pool(hidden, batch, [number], "mean"), own.classifier)
            assert_close(found[0], logits.softmax(0))


@examples(40)
@given(cases())
def test_sequence_score_is_the_adapter_s_own_where_it_has_a_head(case: Case) -> None:
    """A row's CLS embedding and head are each its adapter's or the trunk's, whatever is beside."""
    assume(case.config.cls_token_id is not None)
    weights, references = weights_for(case), case.references()
    trunk = TrunkHeads.of(case.gpt.state_dict(), torch.device("cpu")).sequence
    batch = packed([row.ids for row in case.rows])
    lora = LoraBatch.of_rows(batch.lengths, weights)
    hidden = encoder_of(case.gpt).forward(batch, lora)[FINAL]
    for row, own, start in zip(case.rows, weights, batch.starts, strict=True):
        head = (own.sequence_head if own else None) or trunk
        score = sequence_scores(hidden[start : start + 1], head)
        expected = references[row.adapter].sequence_scores(row.ids[None], torch.ones(1, 1))
        assert_close(score, expected.detach())


@examples(30)
@given(cases())
def test_row_alone_equals_row_in_mixed_batch(case: Case) -> None:
    encoder, weights = encoder_of(case.gpt), weights_for(case)
    together = encode(encoder, [row.ids for row in case.rows], weights)
    for row, own, state in zip(case.rows, weights, together, strict=True):
        assert_close(state, encode(encoder, [row.ids], [own])[0])


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_too_long_for_one_micro_batch_equals_the_reference(shared: bool) -> None:
    """Some 4,000 tokens, adapters and lengths in turn: part boundaries fall anywhere."""
    gpt = lively_gpt(a_config(share_main_matrices=shared), 5)
    tensors = [random_adapter(gpt.config, seed, norms=True) for seed in (1, 2)]
    sets = [AdapterSet(t, {"lora_alpha": "8.0"}, "") for t in tensors]
    ready = [*(served(a, gpt.config, torch.float32) for a in sets), None]
    references = [*(under_adapter(gpt, t, 8.0) for t in tensors), gpt]
    rows = [torch.randint(32, (length,)) for length in [64, 1, 17, 64, 50, 33, 64, 2] * 14]
    turn = [(number // 5) % 3 for number in range(len(rows))]
    found = encode(encoder_of(gpt), rows, [ready[i] for i in turn])
    for row, i, state in zip(rows, turn, found, strict=True):
        assert_close(state, states_of(references[i], row)[-1])


@pytest.mark.parametrize(("rows", "parts"), [(32, 6), (12, 2), (13, 3), (1, 1), (7, 2)])
def test_parts_of_equal_rows_are_of_equal_size(rows: int, parts: int) -> None:
    """Each is one thread's: two of 6 rows and one of 1 would leave a thread without work."""
    whole = packed([torch.zeros(128, dtype=torch.long)] * rows)
    lora = LoraBatch.of_rows(whole.lengths, [None] * rows)
    found = [len(part.batch.lengths) for part in parts_of(whole, lora, 768)]
    assert len(found) == parts
    assert sum(found) == rows
    assert max(found) - min(found) <= 1


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2)), min_size=1, max_size=40),
    st.integers(1, 200),
    st.sampled_from([1, 4, 16]),
    st.booleans(),
)
def test_parts_are_whole_sequences_within_the_limit_and_aligned(
    rows: list[tuple[int, int]], limit: int, align: int, adapters_too: bool
) -> None:
    adapters = [None, AdapterWeights(), AdapterWeights()]
    whole = packed([torch.arange(n) + n for n, _ in rows])
    lora = LoraBatch.of_rows(whole.lengths, [adapters[kind] for _, kind in rows])
    parts = list(parts_of(whole, lora, limit, align, adapters_too))
    assert [n for part in parts for n in part.batch.lengths] == whole.lengths
    assert torch.equal(torch.cat([part.real(part.batch.ids) for part in parts]), whole.ids)
    assert all(p.end - p.start <= limit or len(p.batch.lengths) == 1 for p in parts)
    row = iter(rows)
    for part in parts:
        assert len(part.batch.ids) == part.lora.segments[-1].end
        assert len(part.batch.ids) % align == 0
        if adapters_too:
            assert all(s.start % align == 0 for s in part.lora.segments)
        for start, length in zip(part.batch.starts, part.batch.lengths, strict=True):
            n, kind = next(row)
            assert torch.equal(part.batch.ids[start : start + length], torch.arange(n) + n)
            (own,) = [s for s in part.lora.segments if s.start <= start and start + n <= s.end]
            assert own.adapter is adapters[kind]


def poisoned(weights: AdapterWeights) -> AdapterWeights:
    nan = {site: (a, torch.full_like(b, torch.nan)) for site, (a, b) in weights.lora.items()}
    return AdapterWeights(nan, weights.norms)


@pytest.mark.parametrize("order", ["A N", "N A", "N A N", "A N A", "N - A N"])
def test_a_row_beside_a_nan_filled_adapter_is_bitwise_what_it_is_beside_a_sound_one(
    order: str,
) -> None:
    gpt = lively_gpt(a_config(share_main_matrices=True), 0)
    a, other = (
        served(
            AdapterSet(random_adapter(gpt.config, seed, norms=True), {"lora_alpha": "8.0"}, ""),
            gpt.config,
            torch.float32,
        )
        for seed in (1, 2)
    )
    kinds = order.split()
    rows = [torch.randint(32, (11,)) for _ in kinds]
    encoder = encoder_of(gpt)
    nan = {"A": a, "N": poisoned(other), "-": None}
    sound = {"A": a, "N": other, "-": None}
    found = encode(encoder, rows, [nan[kind] for kind in kinds])
    expected = encode(encoder, rows, [sound[kind] for kind in kinds])
    for kind, row, state, clean in zip(kinds, rows, found, expected, strict=True):
        if kind == "N":
            assert state.isnan().any(), "the poison must be at work, or nothing is shown"
        else:
            assert torch.equal(state, clean)
            assert_close(state, encode(encoder, [row], [nan[kind]])[0])


def test_bfloat16_rows_point_where_float32_rows_do(kit_backbone: Path) -> None:
    backbone, oracle = read_backbone(kit_backbone), Oracle(kit_backbone)
    encoder = Encoder(backbone.config, backbone.tensors, torch.bfloat16)
    golden = load_file(KIT / "golden_a.safetensors")
    ids = [golden[f"{number}.ids"] for number in range(6)]
    for name in ("ckpt_a", "ckpt_b", None):
        adapter = None if name is None else served(oracle.sets[name], oracle.config, encoder.dtype)
        batch = packed(ids)
        lora = LoraBatch.of_rows(batch.lengths, [adapter] * len(ids))
        hidden = encoder.forward(batch, lora)[FINAL]
        assert hidden.dtype == torch.bfloat16
        for pooling in ("mean", "cls", "last"):
            rows = pool(hidden, batch, range(len(ids)), pooling)
            exact = pool(
                torch.cat([oracle.hidden(row.tolist(), name) for row in ids]),
                batch,
                range(len(ids)),
                pooling,
            )
            cosine = F.cosine_similarity(rows, exact)
            assert cosine.min() >= TOLERANCE[torch.bfloat16]["cosine"], (name, pooling, cosine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shared", "copies"), [(True, 1), (False, TINY.n_layer)])
def test_a_shared_matrix_is_placed_once(dtype: torch.dtype, shared: bool, copies: int) -> None:
    encoder = encoder_of(random_gpt(a_config(share_main_matrices=shared)), dtype)
    for path in MAIN_MATRICES:
        linears = [getattr(block, path.replace(".", "_")) for block in encoder.blocks]
        assert len({linear.weight.data_ptr() for linear in linears}) == copies, path
        assert len({linear.bias.data_ptr() for linear in linears}) == copies, path
        assert linears[0].weight.dtype == dtype


def test_a_fresh_adapter_changes_no_bit() -> None:
    gpt = lively_gpt(a_config(), 3)
    tensors = random_adapter(gpt.config, 1)
    for name in tensors:
        if name.endswith("B.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
    fresh = served(AdapterSet(tensors, {"lora_alpha": "16"}, ""), gpt.config, torch.float32)
    row = torch.randint(32, (20,))
    with_it, without = (encode(encoder_of(gpt), [row], [own])[0] for own in (fresh, None))
    assert torch.equal(with_it, without)


def test_the_encoder_does_not_change_the_weights_it_was_given() -> None:
    gpt = lively_gpt(a_config(cls_token_id=0), 3)
    tensors = backbone_tensors(gpt.config, gpt.state_dict())
    before = copy.deepcopy(tensors)
    encode(Encoder(gpt.config, tensors), [torch.arange(32)], [None])
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
