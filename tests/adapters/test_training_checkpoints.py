"""Every form that a training run leaves: imported, loaded by the encoder, and equal to GPT."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor
from train_py import Saved, saved_by_train_py, write

from adapters.format import read_adapter
from adapters.importers import Options, import_checkpoint
from adapters.weights import weights_of
from model.checkpoint import read_backbone
from model.config import GPTConfig
from model.encoder import FINAL, Encoder
from model.gpt import GPT, plain_name
from model.lora import AdapterWeights, LoraBatch
from model.packed import PackedBatch

LENGTHS = [1, 7, 30, 64]
TOLERANCE = 2e-5
Change = Callable[[Saved], Saved]


def prefixed(*prefixes: str) -> Change:
    def change(saved: Saved) -> Saved:
        prefix = "".join(prefixes)
        return saved | {"model": {prefix + name: t for name, t in saved["model"].items()}}

    return change


def compiled_by_block(saved: Saved) -> Saved:
    parts = {name: name.split(".") for name in saved["model"]}
    named = {
        ".".join([*p[:3], "_orig_mod", *p[3:]]) if p[:2] == ["transformer", "h"] else name: name
        for name, p in parts.items()
    }
    return saved | {"model": {new: saved["model"][old] for new, old in named.items()}}


def as_dtype(dtype: torch.dtype) -> Change:
    return lambda saved: saved | {"model": {n: t.to(dtype) for n, t in saved["model"].items()}}


def without_args(*keys: str) -> Change:
    def change(saved: Saved) -> Saved:
        args = {key: value for key, value in saved["model_args"].items() if key not in keys}
        return saved | {"model_args": args}

    return change


def with_args(**args: object) -> Change:
    return lambda saved: saved | {"model_args": saved["model_args"] | args}


def with_shared_attention(saved: Saved) -> Saved:
    """As LoRA at attention alone left it in the older script."""
    first = "transformer.h.0.attn.c_"
    own = {n: t for n, t in saved["model"].items() if n.startswith(first)}
    return saved | {"model": saved["model"] | {n.replace("h.0", "h.1"): t for n, t in own.items()}}


def as_it_is(saved: Saved) -> Saved:
    return saved


def tiny(**fields: Any) -> GPTConfig:
    return dataclasses.replace(TINY, **fields)


PLAIN = TINY.vocab_size - 3  # without the special tokens
FAMILY: dict[str, tuple[GPTConfig, Change]] = {
    "as written": (TINY, as_it_is),
    "compiled": (TINY, prefixed("_orig_mod.")),
    "parallel": (TINY, prefixed("module.")),
    "parallel, then compiled": (TINY, prefixed("_orig_mod.", "module.")),
    "compiled, then parallel, twice": (TINY, prefixed(*["module.", "_orig_mod."] * 2)),
    "compiled block by block": (TINY, compiled_by_block),
    "bfloat16": (TINY, as_dtype(torch.bfloat16)),
    "float16": (TINY, as_dtype(torch.float16)),
    "no bias": (tiny(bias=False), as_it_is),
    "unshared": (tiny(share_main_matrices=False), as_it_is),
    "unshared, no bias": (tiny(share_main_matrices=False, bias=False), as_it_is),
    "shared, and the config says no": (TINY, with_args(share_main_matrices=False)),
    "shared, and the config says nothing": (TINY, without_args("share_main_matrices")),
    "only attention is shared": (tiny(share_main_matrices=False), with_shared_attention),
    "one layer": (tiny(n_layer=1, share_main_matrices=False), as_it_is),
    "LoRA at attention alone": (tiny(use_lora_mlp=False), as_it_is),
    "LoRA at the MLP alone": (tiny(use_lora_attn=False), as_it_is),
    "rank 1": (tiny(lora_rank=1), as_it_is),
    "rank 64": (tiny(lora_rank=64, lora_alpha=3.0), as_it_is),
    "no critic": (tiny(add_critic_head=False), as_it_is),
    "no special tokens": (
        tiny(vocab_size=PLAIN, mask_token_id=None, pad_token_id=None, cls_token_id=None),
        as_it_is,
    ),
    "special tokens in the meta alone": (
        tiny(vocab_size=PLAIN + 1, pad_token_id=None, cls_token_id=None),
        without_args("mask_token_id", "pad_token_id", "cls_token_id"),
    ),
    "no vocab_size and no block_size": (TINY, without_args("vocab_size", "block_size")),
    "an unknown key that is off": (TINY, with_args(film_rank=0, use_moe=False, router=None, x=[])),
}
OLD_FORMAT = {"old format": "as written", "old format, bfloat16": "bfloat16"}


def reference(config: GPTConfig, saved: Saved) -> GPT:
    """The training model with the checkpoint's weights, in float32."""
    gpt = GPT(config).eval()
    state = {plain_name(name): tensor.float() for name, tensor in saved["model"].items()}
    gpt.load_state_dict(state, strict=config.cls_token_id is not None)
    return gpt


def rows(config: GPTConfig) -> list[Tensor]:
    torch.manual_seed(1)
    found = [torch.randint(config.vocab_size, (length,)) for length in LENGTHS]
    if config.cls_token_id is not None:
        found[2][0] = config.cls_token_id
    return found


@torch.inference_mode()
def assert_equal(encoder: Encoder, weights: AdapterWeights | None, gpt: GPT) -> None:
    ids = rows(encoder.config)
    batch = PackedBatch(torch.cat(ids), LENGTHS)
    states = encoder.forward(batch, LoraBatch.of_rows(LENGTHS, [weights] * len(ids)))[FINAL]
    for row, got in zip(ids, states.split(LENGTHS), strict=True):
        everything = torch.ones(1, len(row))  # the server packs rows: nothing in one is padding
        expected = gpt.hidden_states(row[None], everything)[-1][0]
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", [*FAMILY, *OLD_FORMAT])
def test_what_is_imported_computes_what_the_training_model_computes(
    tmp_path: Path, kind: str
) -> None:
    config, change = FAMILY[OLD_FORMAT.get(kind, kind)]
    saved = change(saved_by_train_py(config))
    ckpt = write(tmp_path / "ckpt.pt", saved, old_format=kind in OLD_FORMAT)
    imported = import_checkpoint(ckpt, None, tmp_path / "trunk")
    assert imported.adapter is not None
    backbone = read_backbone(tmp_path / "trunk")
    encoder = Encoder(backbone.config, backbone.tensors)
    adapter = read_adapter(imported.adapter)
    weights = weights_of(adapter, backbone.config, torch.float32, lambda t, d: t.to(d).contiguous())
    assert_equal(encoder, weights, reference(config, saved))
    shared = config.share_main_matrices or config.n_layer == 1
    assert backbone.config.share_main_matrices is shared
    assert any(name.startswith("shared.") for name in backbone.tensors) is shared
    has_lora = {"attn": config.use_lora_attn, "mlp": config.use_lora_mlp}
    for part, has in has_lora.items():
        assert any(f".{part}.lora_" in name for name in adapter.tensors) is has


def test_trunk_only_imports_the_model_without_its_lora(tmp_path: Path) -> None:
    saved = saved_by_train_py()
    ckpt = write(tmp_path / "ckpt.pt", saved)
    imported = import_checkpoint(ckpt, None, tmp_path / "trunk", options=Options(trunk_only=True))
    assert imported.adapter is None
    assert not (tmp_path / "trunk" / "adapters").exists()
    backbone = read_backbone(tmp_path / "trunk")
    gpt = reference(TINY, saved)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if ".lora_" in name and ".B." in name:
                parameter.zero_()
    assert_equal(Encoder(backbone.config, backbone.tensors), None, gpt)
    again = import_checkpoint(ckpt, None, tmp_path / "trunk", options=Options(trunk_only=True))
    assert again.backbone is None
    assert "already" in again.notes[-1]
