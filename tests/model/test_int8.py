"""The trunk in 8 bits: its products against exact arithmetic, its rows against float32."""

import pytest
import torch
from conftest import random_gpt
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import backbone_tensors
from model.config import GPTConfig
from model.encoder import FINAL, Encoder
from model.kernels import library
from model.lora import AdapterWeights, LoraBatch
from model.packed import PackedBatch
from model.quantized import Int8Unavailable, Linear8

ROUNDING = 2.0**-8  # the most that one rounding to bfloat16 moves a value, of it
COSINE = 0.995  # of pooled rows to float32's, on average

compiled = pytest.mark.skipif(
    library() is None, reason="needs a C++ compiler at install and AVX-512 bfloat16 and VNNI"
)


def a_layer(out: int, into: int, biased: bool = True) -> tuple[Linear8, Tensor, Tensor | None]:
    weight = torch.randn(out, into)
    bias = torch.randn(out).bfloat16() if biased else None
    loaded = library()
    assert loaded is not None
    return Linear8.of(loaded, weight, bias), weight, bias


@compiled
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 20),
    st.sampled_from([32, 64, 96, 384]),
    st.sampled_from([64, 192]),
    st.booleans(),
    st.floats(-3, 3),
    st.integers(0, 1 << 30),
)
@example(rows=6, into=384, out=192, biased=True, middle=0.0, seed=300)  # many ties in a row
def test_a_product_is_that_of_rows_and_weights_rounded_to_8_bits(
    rows: int, into: int, out: int, biased: bool, middle: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, weight, bias = a_layer(out, into, biased)
    x = (torch.randn(rows, into) + middle).bfloat16()
    w = layer.panels.transpose(1, 2).reshape(out, into).double() * layer.scales[:, None].double()
    assert ((w - weight).abs() <= 0.5001 * layer.scales[:, None]).all()
    low, high = x.double().amin(1).clamp(max=0), x.double().amax(1).clamp(min=0)
    step = (high - low)[:, None] / 255
    zero = (-low[:, None] / step).round()
    levels = ((x.double() / step).round() + zero).clamp(0, 255) - zero
    exact = levels * step @ w.t()
    if bias is not None:
        exact = exact + bias.double()
    # A value in the middle of two steps may go to either.
    either = ((x.double() / step).frac().abs() - 0.5).abs() < 1e-3
    ties = 1e-5 + step * (either.double() @ w.abs().t())
    # What is rounded to bfloat16 is the product with its ties, |exact| + ties at most.
    slack = ties + ROUNDING * (exact.abs() + ties)
    assert ((layer(x).double() - exact).abs() <= slack).all()


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_changes_no_other(value: float) -> None:
    torch.manual_seed(0)
    layer, _, _ = a_layer(64, 64)
    x = torch.randn(9, 64).bfloat16()
    before = layer(x)
    x[4, 13] = value
    after = layer(x)
    assert not after[4].isfinite().any()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(after[others], before[others])


@compiled
def test_a_row_alone_is_bitwise_what_it_is_among_others_and_added_to_a_residual() -> None:
    torch.manual_seed(0)
    layer, _, _ = a_layer(128, 96)
    x, residual = torch.randn(13, 96).bfloat16(), torch.randn(13, 128).bfloat16()
    together = layer(x)
    for row in range(13):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    added = layer.add_to(residual.clone(), x).float()
    torch.testing.assert_close(added, residual.float() + together.float(), atol=0.05, rtol=0.01)


@compiled
def test_a_row_of_zeros_gives_the_bias() -> None:
    layer, _, bias = a_layer(64, 32)
    assert bias is not None
    assert torch.equal(layer(torch.zeros(2, 32).bfloat16()), bias.expand(2, 64))


def a_config() -> GPTConfig:
    return GPTConfig(
        n_layer=4, n_head=4, n_embd=256, vocab_size=64, block_size=128, share_main_matrices=True
    )


def pooled(encoder: Encoder, lengths: list[int], adapters: list[AdapterWeights | None]) -> Tensor:
    torch.manual_seed(1)
    batch = PackedBatch(torch.randint(64, (sum(lengths),)), lengths)
    states = encoder.forward(batch, LoraBatch.of_rows(lengths, adapters))[FINAL].float()
    return torch.stack([row.mean(0) for row in states.split(lengths)])


def an_adapter(config: GPTConfig, dtype: torch.dtype) -> AdapterWeights:
    torch.manual_seed(2)
    pairs = {
        (layer, "mlp.lora_fc"): (
            torch.randn(8, config.n_embd) * config.n_embd**-0.5,
            torch.randn(8, 4 * config.n_embd) * 0.3,
        )
        for layer in range(config.n_layer)
    }
    return AdapterWeights({site: (a.to(dtype), b.to(dtype)) for site, (a, b) in pairs.items()})


@compiled
def test_pooled_rows_point_where_float32_s_do_with_adapters_and_without() -> None:
    gpt = random_gpt(a_config(), 0)
    tensors = backbone_tensors(gpt.config, gpt.state_dict())
    lengths = [1, 5, 128, 17, 64, 40, 33, 100]
    found = pooled(
        Encoder(gpt.config, tensors, torch.bfloat16, int8=True),
        lengths,
        [None, an_adapter(gpt.config, torch.bfloat16)] * 4,
    )
    exact = pooled(
        Encoder(gpt.config, tensors, torch.float32),
        lengths,
        [None, an_adapter(gpt.config, torch.float32)] * 4,
    )
    assert F.cosine_similarity(found, exact).mean() >= COSINE


def test_what_cannot_be_served_in_8_bits_is_refused_with_a_sentence() -> None:
    gpt = random_gpt(a_config(), 0)
    tensors = backbone_tensors(gpt.config, gpt.state_dict())
    with pytest.raises(Int8Unavailable, match="needs the compiled operators"):
        Encoder(gpt.config, tensors, torch.bfloat16, compiled=False, int8=True)
    with pytest.raises(Int8Unavailable, match="needs the compiled operators"):
        Encoder(gpt.config, tensors, torch.float32, int8=True)


@compiled
def test_widths_that_do_not_fit_are_refused_with_a_sentence() -> None:
    with pytest.raises(Int8Unavailable, match="multiple of 64"):
        a_layer(96, 96)
