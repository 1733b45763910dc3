"""The plan of a GPU's attention call, with a call of the same shape in place of its kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import backbone_tensors
from model.config import GPTConfig
from model.encoder import FINAL, Encoder
from model.gpt import GPT
from model.lora import LoraBatch
from model.operators import TorchOperators
from model.packed import PackedBatch
from model.varlen import VarlenOperators, bounds_of

CONFIG = GPTConfig(
    n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=64, share_main_matrices=True
)
lengths_of_rows = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, q_most: int, k_most: int
) -> Tensor:
    """What flash attention promises for these arguments, a sequence at a time."""
    assert q_bounds.dtype == torch.int32
    assert q_bounds.equal(k_bounds)
    assert int(q_bounds.diff().max()) == q_most == k_most
    assert int(q_bounds[-1]) == q.shape[0]
    out = torch.empty_like(v)
    for start, end in zip(q_bounds[:-1].tolist(), q_bounds[1:].tolist(), strict=True):
        rows = [x[start:end].transpose(0, 1) for x in (q, k, v)]  # (H, T, D)
        out[start:end] = F.scaled_dot_product_attention(*rows).transpose(0, 1)
    return out


@settings(deadline=None, max_examples=30)
@given(lengths_of_rows, st.integers(0, 1 << 30))
def test_one_call_for_all_lengths_gives_what_a_call_a_length_gives(
    lengths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = backbone_tensors(CONFIG, GPT(CONFIG).state_dict())
    batch = PackedBatch(torch.randint(64, (sum(lengths),)), lengths)
    base = LoraBatch.of_rows(lengths, [None] * len(lengths))
    encoder = Encoder(CONFIG, tensors)
    expected = encoder.forward(batch, base)[FINAL]
    encoder.operators = VarlenOperators(CONFIG, torch.float32, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.varlen.varlen_attn", reference)
        found = encoder.forward(batch, base)[FINAL]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@given(lengths_of_rows)
def test_bounds_are_where_sequences_begin_and_the_last_ends(lengths: list[int]) -> None:
    bounds, longest = bounds_of(PackedBatch(torch.zeros(sum(lengths), dtype=torch.long), lengths))
    assert bounds.diff().tolist() == lengths
    assert longest == max(lengths)


def test_a_cpu_has_torch_s_own_attention() -> None:
    assert VarlenOperators.where_possible(CONFIG, torch.bfloat16, torch.device("cpu")) is None
    encoder = Encoder(CONFIG, backbone_tensors(CONFIG, GPT(CONFIG).state_dict()))
    assert type(encoder.operators) is TorchOperators
