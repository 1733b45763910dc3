"""The compiled operators against float32; what is rounded to bfloat16 on the way is allowed for."""

import dataclasses
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import backbone_tensors
from model.config import LORA_SITES, GPTConfig
from model.encoder import FINAL, Encoder
from model.gpt import GPT
from model.kernels import HEAD_DIMS, CompiledOperators, has_tiles, library
from model.layers import LN_EPS, rotary_table, rotate
from model.lora import AdapterWeights, LoraBatch
from model.operators import TorchOperators
from model.packed import PackedBatch
from model.stack import Stack

ROUNDING = 2.0**-8  # the most that one rounding to bfloat16 moves a value, of it
SITE = (0, "mlp.lora_fc")

processor_has_it = torch.cpu._is_avx512_bf16_supported()
with_amx = pytest.mark.skipif(not has_tiles(), reason="this processor has no AMX")
by = pytest.mark.parametrize(
    "tiles", [pytest.param(False, id="AVX-512"), pytest.param(True, id="AMX", marks=with_amx)]
)
compiled = pytest.mark.skipif(
    library() is None, reason="needs a C++ compiler at install and AVX-512 bfloat16"
)


@pytest.mark.skipif(not processor_has_it, reason="this processor has no AVX-512 bfloat16")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_library_is_built_where_it_can_be() -> None:
    assert library() is not None


def a_config(head_dim: int = 64, n_head: int = 2) -> GPTConfig:
    return GPTConfig(
        n_layer=2,
        n_head=n_head,
        n_embd=n_head * head_dim,
        vocab_size=64,
        block_size=300,
        share_main_matrices=True,
    )


def operators(config: GPTConfig, tiles: bool = False) -> CompiledOperators:
    found = CompiledOperators.where_possible(config, torch.bfloat16, torch.device("cpu"), tiles)
    assert found is not None
    assert found.tiles == tiles
    return found


def batch_of(lengths: list[int]) -> PackedBatch:
    return PackedBatch(torch.zeros(sum(lengths), dtype=torch.long), lengths)


def random(*shape: int, size: float = 1.0) -> Tensor:
    return (torch.randn(shape) * size).bfloat16()


def assert_rounded(found: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
    """`found` is bfloat16 of what is within `allowed` of `exact`."""
    slack = allowed + ROUNDING * exact.abs()
    assert ((found.float() - exact).abs() <= slack).all(), (found.float() - exact).abs().max()


lengths_of_rows = st.lists(st.integers(1, 70) | st.integers(1, 300), min_size=1, max_size=6)


@by
@compiled
@settings(deadline=None, max_examples=60)
@given(lengths_of_rows, st.sampled_from(HEAD_DIMS), st.integers(1, 3), st.integers(0, 1 << 30))
def test_attention_is_within_each_sequence_and_rotated(
    tiles: bool, lengths: list[int], head_dim: int, heads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    config = a_config(head_dim, heads)
    batch, width = batch_of(lengths), heads * head_dim
    qkv = random(sum(lengths), 3 * width)
    found = operators(config, tiles).of(batch, LoraBatch.of_rows(lengths, [None] * len(lengths)))
    out = found.attention(qkv)
    cos, sin = rotary_table(config.block_size, head_dim)
    for start, length in zip(batch.starts, lengths, strict=True):
        row = qkv[start : start + length].float().view(length, 3, heads, head_dim)
        q, k, v = row.permute(1, 2, 0, 3)  # (H, T, D) each
        q, k = (rotate(x, cos[:length], sin[:length]).bfloat16().float() for x in (q, k))
        exact = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(length, width)
        # q, k rounded after rotation on both sides, to neighbours at times; the shares are rounded
        assert_rounded(out[start : start + length], exact, 4 * ROUNDING * float(v.abs().max()))


ranks = st.sampled_from([None, 1, 4, 7, 8, 9, 16, 32, 64])


@compiled
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), ranks), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_each_segment_gets_its_own_lora_and_every_token_its_gelu(
    rows: list[tuple[int, int | None]], gelu: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    config = a_config()
    wide, out = config.n_embd, 4 * config.n_embd
    adapters = [
        AdapterWeights({SITE: (random(rank, wide, size=wide**-0.5), random(rank, out))})
        if rank
        else None
        for _, rank in rows
    ]
    lengths = [length for length, _ in rows]
    x, y = random(sum(lengths), wide), random(sum(lengths), out)
    part = operators(config).of(batch_of(lengths), LoraBatch.of_rows(lengths, adapters))
    add = part.add_lora_gelu if gelu else part.add_lora
    found = add(SITE, x, y.clone())
    start = 0
    for length, adapter in zip(lengths, adapters, strict=True):
        tokens = slice(start, start + length)
        start += length
        exact, allowed = y[tokens].float(), torch.zeros(1)
        if adapter is not None:
            a, b = (matrix.float() for matrix in adapter.lora[SITE])
            low = x[tokens].float() @ a.t()
            exact = exact + low @ b
            allowed = ROUNDING * low.abs() @ b.abs()  # of the low product's rounding
        if gelu:
            exact, allowed = F.gelu(exact), 1.13 * allowed + 4e-5 * exact.abs().clamp(min=1)
        elif adapter is None:
            assert torch.equal(found[tokens], y[tokens])
        assert_rounded(found[tokens], exact, allowed)


@compiled
def test_gelu_is_exact_at_both_ends_and_near_0() -> None:
    config = a_config()
    part = operators(config).of(batch_of([1]), LoraBatch.of_rows([1], [None]))
    values = torch.cat((torch.linspace(-30, 30, 4064), torch.logspace(-30, 4, 32))).bfloat16()
    found = part.add_lora_gelu(SITE, values[None], values[None].clone())[0]
    assert_rounded(found, F.gelu(values.float()), 4e-5 * values.float().abs())
    assert not found[values < -6].any(), "what is far below 0 must end as 0, however far"


@compiled
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_each_segment_is_normed_by_its_own_weights(
    rows: list[tuple[int, bool]], biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    config = a_config()
    lengths = [length for length, _ in rows]

    def weights() -> tuple[Tensor, Tensor | None]:
        return 1 + random(config.n_embd), random(config.n_embd) if biased else None

    base = weights()
    adapters = [AdapterWeights(norms={"ln": weights()}) if own else None for _, own in rows]
    x = random(sum(lengths), config.n_embd, size=3.0) + 1
    part = operators(config).of(batch_of(lengths), LoraBatch.of_rows(lengths, adapters))
    found = part.norm("ln", x, *base)
    start = 0
    for length, adapter in zip(lengths, adapters, strict=True):
        tokens = slice(start, start + length)
        start += length
        w, b = base if adapter is None else adapter.norms["ln"]
        exact = F.layer_norm(
            x[tokens].float(), w.shape, w.float(), None if b is None else b.float(), LN_EPS
        )
        assert_rounded(found[tokens], exact, 1e-5)


def random_weights(config: GPTConfig, seed: int, fill: float | None = None) -> AdapterWeights:
    torch.manual_seed(seed)
    wide = config.n_embd
    widths = {
        "attn.lora_qkv": (wide, 3 * wide),
        "attn.lora_out": (wide, wide),
        "mlp.lora_fc": (wide, 4 * wide),
        "mlp.lora_proj": (4 * wide, wide),
    }
    lora = {}
    for layer in range(config.n_layer):
        for site, (into, out) in widths.items():
            b = random(8, out, size=0.2) if fill is None else torch.full((8, out), fill).bfloat16()
            lora[layer, site] = random(8, into, size=into**-0.5), b
    return AdapterWeights(lora)


def encoder(config: GPTConfig, dtype: torch.dtype, **kwargs: bool) -> Encoder:
    torch.manual_seed(0)
    return Encoder(config, backbone_tensors(config, GPT(config).state_dict()), dtype, **kwargs)


def states(of: Encoder, lengths: list[int], adapters: list[AdapterWeights | None]) -> Tensor:
    torch.manual_seed(1)
    batch = PackedBatch(torch.randint(64, (sum(lengths),)), lengths)
    return of.forward(batch, LoraBatch.of_rows(lengths, adapters))[FINAL].float()


@by
@compiled
def test_the_forward_is_that_of_torch_s_operators_up_to_rounding(tiles: bool, monkeypatch) -> None:
    monkeypatch.setattr("model.kernels.has_tiles", lambda: tiles)
    config, lengths = a_config(), [5, 300, 17, 64, 1, 128, 33] * 3
    adapters = [None, random_weights(config, 1), random_weights(config, 2)] * 7
    fast, plain = encoder(config, torch.bfloat16), encoder(config, torch.bfloat16, compiled=False)
    assert isinstance(fast.operators, CompiledOperators)
    assert (fast.stack is not None) == tiles
    assert isinstance(plain.operators, TorchOperators)
    found, expected = states(fast, lengths, adapters), states(plain, lengths, adapters)
    exact = states(encoder(config, torch.float32), lengths, _in_float32(adapters))
    assert (found - exact).norm() < 0.02 * exact.norm()
    # rounded less often than torch's, so never much farther from float32
    assert (found - exact).norm() <= 1.05 * (expected - exact).norm()


def _in_float32(adapters: list[AdapterWeights | None]) -> list[AdapterWeights | None]:
    return [
        adapter
        and AdapterWeights(
            {site: (a.float(), b.float()) for site, (a, b) in adapter.lora.items()},
            {
                n: (w.float(), None if b is None else b.float())
                for n, (w, b) in adapter.norms.items()
            },
        )
        for adapter in adapters
    ]


@by
@compiled
def test_a_row_beside_a_nan_filled_adapter_is_bitwise_what_it_is_beside_a_sound_one(
    tiles: bool, monkeypatch
) -> None:
    monkeypatch.setattr("model.kernels.has_tiles", lambda: tiles)
    config, lengths = a_config(), [5, 40, 17, 33]
    a, sound = random_weights(config, 1), random_weights(config, 2)
    poisoned = random_weights(config, 2, fill=float("nan"))
    run = encoder(config, torch.bfloat16)
    beside = [
        states(run, lengths, [a, other, None, other]).split(lengths) for other in (sound, poisoned)
    ]
    for row in (0, 2):
        assert torch.equal(beside[0][row], beside[1][row])
        assert not beside[0][row].isnan().any()
    assert beside[1][1].isnan().any()


@compiled
def test_other_dtypes_widths_and_heads_are_left_to_torch() -> None:
    device = torch.device("cpu")
    for config, dtype in (
        (a_config(), torch.float32),
        (a_config(head_dim=16), torch.bfloat16),
        (a_config(head_dim=48), torch.bfloat16),
    ):
        assert CompiledOperators.where_possible(config, dtype, device) is None
        assert isinstance(encoder(config, dtype).operators, TorchOperators)


def random_adapter(config: GPTConfig, rank: int | None, normed: bool) -> AdapterWeights | None:
    """LoRA of a rank at most sites, and some LayerNorms; None is no adapter at all."""
    if rank is None:
        return None
    wide = config.n_embd
    widths = {site: (wide * into, wide * out) for site, (into, out) in LORA_SITES.items()}
    lora = {
        (layer, site): (
            random(rank, into, size=into**-0.5),
            random(rank, out, size=0.3 * rank**-0.5),
        )
        for layer in range(config.n_layer)
        for site, (into, out) in widths.items()
        if torch.rand(()) < 0.8
    }
    names = ["transformer.h.0.ln_2", "transformer.h.1.ln_1", "transformer.ln_f"]
    norms = {name: (1 + random(wide, size=0.2), random(wide)) for name in names if normed}
    return AdapterWeights(lora, norms)


def test_segments_of_a_few_tokens_are_not_for_tiles() -> None:
    adapter = random_weights(a_config(), 1)

    def lora(*lengths: int) -> LoraBatch:
        return LoraBatch.of_rows(lengths, [adapter, None] * (len(lengths) // 2))

    assert Stack.pays(lora(16, 16, 32, 48))
    assert Stack.pays(lora(200, 2))
    assert not Stack.pays(lora(2, 2, 2, 2))
    assert not Stack.pays(lora(17, 17))


@with_amx
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 90), ranks, st.booleans()), min_size=1, max_size=6),
    st.sampled_from([(32, 1), (64, 2), (64, 6), (128, 3)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_every_token_of_every_layer_is_the_one_of_torch_s_operators(
    rows: list[tuple[int, int | None, bool]],
    heads: tuple[int, int],
    biased: bool,
    shared: bool,
    seed: int,
) -> None:
    """As near to float32 as torch's own in bfloat16: on the whole, and token by token."""
    torch.manual_seed(seed)
    config = dataclasses.replace(a_config(*heads), bias=biased, share_main_matrices=shared)
    rows = [*rows, (70, 8, True), (70, None, False)]  # so that means and largest say something
    lengths = [length for length, _, _ in rows]
    adapters = [random_adapter(config, rank, normed) for _, rank, normed in rows]
    tensors = backbone_tensors(config, GPT(config).state_dict())
    tensors["transformer.wte.weight"] *= 50  # to size 1: what is left of nothing is all rounding
    batch = PackedBatch(torch.randint(64, (sum(lengths),)), lengths)
    layers = range(config.n_layer + 1)
    fast = Encoder(config, tensors, torch.bfloat16)
    assert fast.stack is not None
    with pytest.MonkeyPatch.context() as patch:  # segments of any length, long enough or not
        patch.setattr("model.stack.MOST_WASTE", float("inf"))
        found = fast.forward(batch, LoraBatch.of_rows(lengths, adapters), layers)
    plain = Encoder(config, tensors, torch.bfloat16, compiled=False)
    expected = plain.forward(batch, LoraBatch.of_rows(lengths, adapters), layers)
    oracle = Encoder(config, tensors, torch.float32)
    exact = oracle.forward(batch, LoraBatch.of_rows(lengths, _in_float32(adapters)), layers)
    for layer in layers:
        size = exact[layer].norm(dim=1)
        error = (found[layer].float() - exact[layer]).norm(dim=1) / size
        usual = (expected[layer].float() - exact[layer]).norm(dim=1) / size
        assert (error <= 2 * usual + 0.005).all(), layer
        assert error.mean() <= 1.1 * usual.mean() + 0.0005, layer
