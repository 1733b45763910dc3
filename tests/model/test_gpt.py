"""model-guide.md's checklist, line by line, and what the owner's checkpoints must give."""

import copy
import dataclasses
import math

import pytest
import torch
from conftest import KIT, TINY, random_adapter, random_gpt
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from model.config import LORA_SITES, MAIN_MATRICES, GPTConfig
from model.gpt import GPT, HEADS, is_adapter_tensor
from model.heads import SEQUENCE_HEAD
from model.layers import LayerNorm, LoRALinear

KIT_TOLERANCE = 2e-4  # max abs, float32: the kit's own
SPECIAL = {TINY.mask_token_id, TINY.pad_token_id, TINY.cls_token_id}
MASK, PAD, CLS = TINY.mask_token_id, TINY.pad_token_id, TINY.cls_token_id


def some_ids(*shape: int) -> Tensor:
    return torch.randint(min(SPECIAL), shape)


def loras(gpt: GPT) -> dict[str, LoRALinear]:
    return {name: m for name, m in gpt.named_modules() if isinstance(m, LoRALinear)}


# New config fields exist and have sensible defaults.


def test_config_defaults_are_the_guide_s() -> None:
    assert GPTConfig().to_dict() == {
        "block_size": 1024,
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": True,
        "ignore_index": -100,
        "mask_token_id": None,
        "pad_token_id": None,
        "cls_token_id": None,
        "add_critic_head": False,
        "critic_alpha": 0.5,
        "use_lora_attn": False,
        "use_lora_mlp": False,
        "lora_rank": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "share_main_matrices": False,
        "pooling": "mean",
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("vocab_size", 0),
        ("n_layer", 0),
        ("n_head", 0),
        ("n_head", 5),  # 768 is no multiple of it
        ("n_head", 768),  # heads of one value can't be rotated
        ("n_embd", -768),
        ("n_embd", 768.0),
        ("n_embd", True),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("lora_dropout", 1.5),
        ("bias", 1),
        ("mask_token_id", 50304),
        ("pad_token_id", -1),
        ("cls_token_id", "67"),
        ("ignore_index", 5),
        ("critic_alpha", -1.0),
        ("critic_alpha", math.inf),
        ("lora_rank", -1),
        ("lora_alpha", 0.0),
        ("lora_alpha", math.nan),
        ("pooling", "max"),
    ],
)
def test_an_impossible_value_is_refused_with_a_sentence_that_names_it(
    field: str, value: object
) -> None:
    with pytest.raises(ValueError, match=rf"\b{field}\b.* ") as refused:
        GPTConfig(**{field: value})
    assert "\n" not in str(refused.value)


def test_two_special_tokens_can_t_be_one_id() -> None:
    with pytest.raises(ValueError, match="pad_token_id and mask_token_id are both 7"):
        GPTConfig(mask_token_id=7, pad_token_id=7)


def test_an_unknown_config_key_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'n_heads'"):
        GPTConfig.from_dict({"n_heads": 4})


# LoRALinear.


@pytest.mark.parametrize("options", [{"enabled": False}, {"enabled": True, "r": 0}])
def test_a_disabled_lora_returns_zero_and_has_no_state(options: dict[str, object]) -> None:
    lora = LoRALinear(8, 24, **options)
    out = lora(torch.randn(2, 3, 8))
    assert isinstance(out, float)
    assert out == 0.0
    assert list(lora.parameters()) == []
    assert lora.state_dict() == {}


def test_lora_is_b_a_x_times_alpha_over_r() -> None:
    lora = LoRALinear(6, 10, r=3, alpha=12.0, enabled=True)
    torch.nn.init.normal_(lora.B.weight)
    x = torch.randn(4, 6)
    expected = x @ lora.A.weight.t() @ lora.B.weight.t() * 4.0
    torch.testing.assert_close(lora(x), expected)


def test_a_fresh_model_has_b_zero_and_a_as_kaiming_left_it() -> None:
    """The model-wide normal(0.02) would put a tenth of A's values beyond kaiming's bound."""
    config = dataclasses.replace(TINY, n_embd=384, n_head=6)
    for name, lora in loras(GPT(config)).items():
        bound = lora.A.weight.shape[1] ** -0.5  # kaiming_uniform(a=sqrt(5)) is U(-bound, bound)
        largest = lora.A.weight.abs().max().item()
        assert 0.95 * bound < largest <= bound, name
        assert torch.count_nonzero(lora.B.weight) == 0, name


def test_a_fresh_model_s_lora_changes_nothing() -> None:
    torch.manual_seed(0)
    with_lora = GPT(TINY).eval()
    without = GPT(dataclasses.replace(TINY, use_lora_attn=False, use_lora_mlp=False)).eval()
    without.load_state_dict({n: t for n, t in with_lora.state_dict().items() if ".lora_" not in n})
    idx = some_ids(2, 9)
    assert torch.equal(with_lora(idx)[0], without(idx)[0])


def test_the_rest_of_a_fresh_model_is_normal_with_zero_biases_and_unit_norms() -> None:
    gpt = GPT(dataclasses.replace(TINY, n_embd=256, n_head=4, n_layer=8))
    block = gpt.blocks[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # 1/sqrt(16)
    assert gpt.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.count_nonzero(block.attn.c_attn.bias) == 0
    assert torch.all(block.ln_1.weight == 1)


def test_a_layer_s_lora_is_49152_parameters_at_n_embd_384_and_rank_8() -> None:
    config = dataclasses.replace(TINY, n_embd=384, n_head=6, lora_rank=8)
    for block in GPT(config).blocks:
        own = [m for m in block.modules() if isinstance(m, LoRALinear)]
        assert len(own) == 4
        assert sum(p.numel() for lora in own for p in lora.parameters()) == 49_152


# BidirectionalSelfAttention and MLP add the deltas.


@pytest.mark.parametrize("site", LORA_SITES)
@pytest.mark.parametrize("layer", range(TINY.n_layer))
def test_lora_is_an_additive_delta_on_its_own_matrix(site: str, layer: int) -> None:
    """W + s B A, merged into that layer's matrix of an unshared twin, gives the same outputs."""
    matrix = dict(zip(LORA_SITES, MAIN_MATRICES, strict=True))[site]
    gpt = random_gpt(TINY, 1)
    merged = GPT(
        dataclasses.replace(
            TINY, share_main_matrices=False, use_lora_attn=False, use_lora_mlp=False
        )
    ).eval()
    merged.load_state_dict({n: t for n, t in gpt.state_dict().items() if ".lora_" not in n})
    adapter = random_adapter(TINY, 2, ranks={(layer, site): 5})
    gpt.load_adapter_state_dict(adapter, lora_alpha=10.0)
    path = f"transformer.h.{layer}.{site}"
    delta = adapter[f"{path}.B.weight"] @ adapter[f"{path}.A.weight"] * 2.0
    with torch.no_grad():
        merged.blocks[layer].get_submodule(matrix).weight.add_(delta)
    idx = some_ids(3, 12)
    torch.testing.assert_close(gpt(idx)[0], merged(idx)[0])


def test_every_token_sees_every_other_in_both_directions() -> None:
    gpt, idx = random_gpt(TINY), some_ids(1, 8)
    for changed in (0, 7):
        other = idx.clone()
        other[0, changed] = (idx[0, changed] + 1) % min(SPECIAL)
        differs = (gpt.hidden_states(idx)[-1] != gpt.hidden_states(other)[-1]).any(-1)
        assert differs.all()


# The constructor aliases the main matrices, and nothing else.


@pytest.mark.parametrize("bias", [True, False])
def test_main_matrices_are_one_parameter_in_all_blocks_and_layernorms_are_not(bias: bool) -> None:
    gpt = GPT(dataclasses.replace(TINY, n_layer=3, bias=bias))
    first, *others = gpt.blocks
    for block in others:
        for path in MAIN_MATRICES:
            mine, its = block.get_submodule(path), first.get_submodule(path)
            assert mine.weight is its.weight
            assert mine.bias is its.bias
        for path in ("ln_1", "ln_2", "attn.lora_qkv.A", "mlp.lora_proj.B"):
            assert block.get_submodule(path).weight is not first.get_submodule(path).weight


def test_unshared_blocks_have_matrices_of_their_own() -> None:
    first, second = GPT(dataclasses.replace(TINY, share_main_matrices=False)).blocks
    for path in MAIN_MATRICES:
        assert first.get_submodule(path).weight is not second.get_submodule(path).weight


def test_a_loaded_model_is_still_shared_and_tied() -> None:
    gpt = GPT(TINY)
    gpt.load_state_dict(random_gpt(TINY, 3).state_dict())
    assert gpt.lm_head.weight is gpt.wte.weight
    assert gpt.blocks[0].mlp.c_fc.weight is gpt.blocks[1].mlp.c_fc.weight


def test_gradients_reach_a_shared_matrix_from_all_layers() -> None:
    """Its gradient is the sum of the gradients of an unshared twin's matrices."""
    config = dataclasses.replace(TINY, n_layer=3, add_critic_head=False)
    shared = random_gpt(config, 4)
    apart = GPT(dataclasses.replace(config, share_main_matrices=False)).eval()
    apart.load_state_dict(shared.state_dict())
    idx, targets = some_ids(2, 10), some_ids(2, 10)
    for gpt in (shared, apart):
        gpt(idx, targets)[1].backward()
    for path in MAIN_MATRICES:
        grads = [block.get_submodule(path).weight.grad for block in apart.blocks]
        assert all(torch.count_nonzero(grad) > 0 for grad in grads)
        found = shared.blocks[0].get_submodule(path).weight.grad
        torch.testing.assert_close(found, torch.stack(grads).sum(0))


# _build_default_attention_mask returns 1 = keep / 0 = mask.


def test_the_default_mask_is_1_for_all_but_padding() -> None:
    idx = torch.tensor([[CLS, 3, MASK, PAD, PAD]])
    assert GPT(TINY)._build_default_attention_mask(idx).tolist() == [[1, 1, 1, 0, 0]]


def test_without_a_pad_token_nothing_is_masked() -> None:
    gpt = GPT(dataclasses.replace(TINY, pad_token_id=None))
    assert gpt._build_default_attention_mask(torch.tensor([[PAD, MASK]])).tolist() == [[1, 1]]


def test_mask_tokens_are_attended() -> None:
    gpt = random_gpt(TINY)
    idx = torch.tensor([[1, 2, MASK, 4]])
    by_default = gpt.hidden_states(idx)[-1]
    assert torch.equal(by_default, gpt.hidden_states(idx, torch.ones_like(idx))[-1])
    hidden = gpt.hidden_states(idx, (idx != MASK).int())[-1]
    assert not torch.allclose(by_default[0, 0], hidden[0, 0], atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("amount", [1, 7])
def test_padding_is_invisible_to_the_other_tokens(side: str, amount: int) -> None:
    """On the left too: rotary positions are relative."""
    gpt, row = random_gpt(TINY), some_ids(1, 6)
    padding = torch.full((1, amount), PAD)
    padded = torch.cat((row, padding) if side == "right" else (padding, row), dim=1)
    tokens = slice(0, 6) if side == "right" else slice(amount, None)
    torch.testing.assert_close(gpt.hidden_states(padded)[-1][:, tokens], gpt.hidden_states(row)[-1])


def test_an_explicit_mask_hides_what_it_says() -> None:
    gpt, row = random_gpt(TINY), some_ids(1, 6)
    keep = torch.tensor([[1, 1, 1, 1, 0, 0]])
    hidden = gpt.hidden_states(row, keep)[-1][:, :4]
    torch.testing.assert_close(hidden, gpt.hidden_states(row[:, :4])[-1])


def test_more_than_block_size_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens are more than block_size 64"):
        GPT(TINY)(some_ids(1, 65))


def test_the_cls_embedding_stands_in_for_its_row_of_wte() -> None:
    gpt = random_gpt(TINY)
    before = gpt(torch.tensor([[CLS, 1, 2]]))[0]
    with torch.no_grad():
        gpt.wte.weight[CLS] += 1.0
    after = gpt(torch.tensor([[CLS, 1, 2]]))[0]
    torch.testing.assert_close(before[..., :CLS], after[..., :CLS])
    with torch.no_grad():
        gpt.cls_embedding += 1.0
    assert not torch.allclose(gpt(torch.tensor([[CLS, 1, 2]]))[0][..., :CLS], after[..., :CLS])


# The optimizer still builds groups, without duplicates.


def test_the_optimizer_has_each_parameter_once_and_decays_matrices_alone() -> None:
    gpt = GPT(TINY)
    decayed, plain = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert decayed["lr"] == 1e-3
    assert decayed["betas"] == (0.9, 0.95)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() < 2 for p in plain["params"])
    ids = [id(p) for p in decayed["params"] + plain["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in gpt.parameters()}


def test_a_step_moves_a_shared_matrix_as_one() -> None:
    gpt = random_gpt(TINY).train()
    optimizer = gpt.configure_optimizers(0.0, 1e-3, (0.9, 0.95))
    before = gpt.blocks[0].mlp.c_fc.weight.detach().clone()
    gpt(some_ids(2, 8), some_ids(2, 8))[1].backward()
    optimizer.step()
    moved = (gpt.blocks[1].mlp.c_fc.weight - before).abs().max().item()
    assert 0 < moved <= 1.01e-3  # Adam's first step is at most the learning rate: made once


@pytest.mark.parametrize("heads", [(), ("critic_head",), HEADS])
def test_a_frozen_base_trains_lora_and_layernorms_and_heads_on_request(
    heads: tuple[str, ...],
) -> None:
    gpt = GPT(TINY)
    gpt.freeze_base(heads)
    trainable = {id(p) for p in gpt.parameters() if p.requires_grad}
    modules = [m for m in gpt.modules() if isinstance(m, (LoRALinear, LayerNorm))]
    modules += [getattr(gpt, name) for name in heads if name != "cls_embedding"]
    wanted = {id(p) for module in modules for p in module.parameters()}
    assert trainable == wanted | ({id(gpt.cls_embedding)} if "cls_embedding" in heads else set())
    groups = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95)).param_groups
    assert {id(p) for group in groups for p in group["params"]} == trainable


# The critic.


def critic_case() -> tuple[GPT, Tensor, Tensor, Tensor, Tensor]:
    """A model, masked ids, the truth, where masks are, and which tokens count."""
    gpt, truth = random_gpt(TINY, 6), some_ids(2, 9)
    truth[1, 6:] = PAD
    masked = torch.zeros_like(truth, dtype=torch.bool)
    masked[0, [1, 4]] = masked[1, [0, 5]] = True
    return gpt, truth.masked_fill(masked, MASK), truth, masked, truth != PAD


def certain(ids: Tensor) -> Tensor:
    """Logits under which sampling gives these ids."""
    return F.one_hot(ids, TINY.vocab_size).float() * 1e4


@pytest.mark.parametrize("shift", [0, 1])
def test_the_critic_s_target_is_1_where_the_sampled_token_is_wrong(shift: int) -> None:
    gpt, idx, truth, masked, keep = critic_case()
    guess = torch.where(masked, (truth + shift) % min(SPECIAL), truth)
    targets = truth.masked_fill(~masked, TINY.ignore_index)
    scores = gpt.critic_scores(guess)
    wrong = masked if shift else torch.zeros_like(masked)
    losses = torch.where(wrong, F.softplus(-scores), F.softplus(scores))
    found = gpt.critic_loss(idx, targets, certain(guess))
    torch.testing.assert_close(found, losses[keep].mean())


def test_the_loss_is_cross_entropy_of_the_masked_plus_alpha_times_the_critic_s() -> None:
    gpt, idx, truth, masked, _ = critic_case()
    targets = truth.masked_fill(~masked, TINY.ignore_index)
    torch.manual_seed(1)
    logits, loss = gpt(idx, targets)
    torch.manual_seed(1)
    critic = gpt.critic_loss(idx, targets, logits)
    expected = F.cross_entropy(logits[masked], truth[masked]) + TINY.critic_alpha * critic
    torch.testing.assert_close(loss, expected)
    assert gpt(idx)[1] is None


def test_critic_gradients_reach_the_trunk() -> None:
    gpt, idx, truth, masked, _ = critic_case()
    targets = truth.masked_fill(~masked, TINY.ignore_index)
    gpt.critic_loss(idx, targets, certain(truth)).backward()
    for path in MAIN_MATRICES:
        assert torch.count_nonzero(gpt.blocks[0].get_submodule(path).weight.grad) > 0, path


def test_a_model_without_a_critic_head_says_so() -> None:
    with pytest.raises(ValueError, match="no critic head"):
        GPT(dataclasses.replace(TINY, add_critic_head=False)).critic_scores(some_ids(1, 3))


def test_a_model_without_a_cls_token_has_no_sequence_score_and_says_so() -> None:
    with pytest.raises(ValueError, match="no sequence head"):
        GPT(dataclasses.replace(TINY, cls_token_id=None)).sequence_scores(some_ids(1, 3))


# Adapter sets.


def test_an_adapter_state_dict_round_trips_onto_a_fresh_model_of_the_trunk() -> None:
    tuned = random_gpt(TINY, 7)
    other = copy.deepcopy(tuned)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if is_adapter_tensor(name):
                parameter.add_(torch.randn_like(parameter))
    state = tuned.adapter_state_dict()
    other.load_adapter_state_dict(state, lora_alpha=TINY.lora_alpha)
    idx = some_ids(2, 11)
    assert torch.equal(other(idx)[0], tuned(idx)[0])
    assert torch.equal(other.critic_scores(idx), tuned.critic_scores(idx))
    idx[:, 0] = CLS
    assert torch.equal(other.sequence_scores(idx), tuned.sequence_scores(idx))
    assert {name: t.shape for name, t in other.adapter_state_dict().items()} == {
        name: t.shape for name, t in state.items()
    }


def test_an_adapter_state_dict_has_lora_layernorms_and_heads_and_shares_no_memory() -> None:
    gpt = random_gpt(TINY)
    state = gpt.adapter_state_dict()
    expected = {
        f"transformer.h.{i}.{s}.{m}.weight" for i in (0, 1) for s in LORA_SITES for m in "AB"
    }
    norms = ["transformer.ln_f", *(f"transformer.h.{i}.ln_{n}" for i in (0, 1) for n in (1, 2))]
    expected |= {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
    assert set(state) == expected | {"critic_head.weight", "cls_embedding", *SEQUENCE_HEAD}
    before = gpt.critic_head.weight.detach().clone()
    state["critic_head.weight"].zero_()
    assert torch.equal(gpt.critic_head.weight, before)


def test_a_loaded_adapter_brings_its_own_ranks_and_removes_what_it_lacks() -> None:
    gpt = random_gpt(TINY)
    ranks = {(0, "attn.lora_qkv"): 1, (1, "mlp.lora_proj"): 7}
    gpt.load_adapter_state_dict(random_adapter(TINY, 1, ranks=ranks), lora_alpha=14.0)
    active = {name: lora for name, lora in loras(gpt).items() if lora.enabled}
    assert {name: lora.r for name, lora in active.items()} == {
        "transformer.h.0.attn.lora_qkv": 1,
        "transformer.h.1.mlp.lora_proj": 7,
    }
    assert active["transformer.h.1.mlp.lora_proj"].scaling == 2.0


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.2.attn.lora_qkv.A.weight",  # there are two layers
        "transformer.h.0.attn.lora_k.A.weight",
        "transformer.h.2.ln_1.weight",
        "transformer.h.0.attn.lora_out.A.weight",  # its B is not there
        "sequence_head.A",  # the rest of the head is not there
    ],
)
def test_an_adapter_tensor_without_a_place_is_refused_and_nothing_changes(name: str) -> None:
    gpt = random_gpt(TINY)
    before = copy.deepcopy(gpt.state_dict())
    adapter = random_adapter(TINY, 1, ranks={(0, "attn.lora_qkv"): 2}, norms=True)
    with pytest.raises(ValueError, match=r"lora|wte|c_fc|ln_1|sequence_head"):
        gpt.load_adapter_state_dict(adapter | {name: torch.ones(16, 16)}, lora_alpha=8.0)
    after = gpt.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


# generate.


def test_generate_appends_new_tokens_and_leaves_the_prompt_alone() -> None:
    gpt = random_gpt(TINY)
    prompt = torch.tensor([[CLS, 3, MASK, 5], [7, PAD, 9, MASK]])
    out = gpt.generate(prompt, 20, 0.8, 10)
    assert out.shape == (2, 24)
    assert torch.equal(out[:, :4], prompt)


@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (5, 59), (5, 200), (64, 1), (150, 40)])
def test_no_special_token_is_generated_however_long_the_text(
    critic: bool, prompt: int, new: int
) -> None:
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(TINY, add_critic_head=critic)).eval()  # nearly even chances
    out = gpt.generate(some_ids(2, prompt), new, temperature=5.0)
    assert out.shape == (2, prompt + new)
    assert not SPECIAL & set(out.flatten().tolist())


def test_every_step_reads_the_prompt_as_it_was_given() -> None:
    gpt, prompt = random_gpt(TINY), torch.tensor([[CLS, MASK, 4, PAD, MASK]])
    seen: list[Tensor] = []
    gpt.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    gpt.generate(prompt, 6, steps=4)
    assert len(seen) == 4
    assert all(torch.equal(idx[:, :5], prompt) for idx in seen)


def test_one_step_with_top_k_1_is_the_argmax_at_the_appended_masks() -> None:
    gpt, prompt = random_gpt(TINY), some_ids(3, 6)
    logits = gpt(torch.cat((prompt, torch.full((3, 4), MASK)), dim=1))[0]
    expected = logits[:, 6:, : min(SPECIAL)].argmax(-1)  # special tokens are the last ids
    assert torch.equal(gpt.generate(prompt, 4, top_k=1, steps=1)[:, 6:], expected)


def test_what_the_critic_finds_likeliest_wrong_is_masked_again() -> None:
    gpt = random_gpt(TINY)
    seen: list[Tensor] = []
    gpt.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    doubted = torch.tensor([[0.0] * 6 + [0.1, 0.9, 0.2, 0.8]])
    gpt.critic_scores = lambda idx, attention_mask=None: doubted  # type: ignore[method-assign]
    gpt.generate(some_ids(1, 6), 4, steps=3)
    masked = [(idx[0] == MASK).nonzero().flatten().tolist() for idx in seen]
    assert masked == [[6, 7, 8, 9], [6 + 1, 6 + 2, 6 + 3], [6 + 1, 6 + 3]]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 0}])
def test_generate_refuses_impossible_options_with_a_sentence(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        random_gpt(TINY).generate(some_ids(1, 3), 2, **options)


def test_generate_without_a_mask_token_says_so() -> None:
    with pytest.raises(ValueError, match="mask_token_id"):
        GPT(dataclasses.replace(TINY, mask_token_id=None)).generate(some_ids(1, 3), 2)


# The owner's checkpoints.


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_owner_s_checkpoints_load_as_they_are_and_give_the_reference(name: str) -> None:
    saved = torch.load(KIT / f"ckpt_{name}.pt", weights_only=True)
    args = {k: v for k, v in saved["model_args"].items() if k != "use_guidance"}
    gpt = GPT(GPTConfig(**args)).eval()
    gpt.load_state_dict(saved["model"])
    golden = load_file(KIT / f"golden_{name}.safetensors")
    for number in range(6):
        idx = golden[f"{number}.ids"][None]
        keep = torch.ones_like(idx)
        with torch.no_grad():
            found = {
                "hidden": gpt.hidden_states(idx, keep)[-1][0],
                "critic": gpt.critic_scores(idx, keep)[0],
                "lm_logits_last": gpt(idx, attention_mask=keep)[0][0, -1],
                "sequence_score": gpt.sequence_scores(idx, keep),
            }
        for output, value in found.items():
            expected = golden[f"{number}.{output}"]
            torch.testing.assert_close(value, expected, rtol=0, atol=KIT_TOLERANCE)


def test_a_checkpoint_with_a_tensor_missing_does_not_load() -> None:
    state = random_gpt(TINY).state_dict()
    del state["transformer.h.1.ln_2.weight"]
    with pytest.raises(RuntimeError, match=r"h\.1\.ln_2\.weight"):
        GPT(TINY).load_state_dict(state)
