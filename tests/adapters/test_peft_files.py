"""PEFT folders in and out, with the peft library as the judge."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_adapter
from peft_judge import (
    ALL_LINEARS,
    DEEP,
    assert_same,
    gpt_of,
    loaded_by_peft,
    make_backbone,
    peft_answers,
    served_answers,
    trained_by_peft,
    write_set,
)
from safetensors.torch import load_file

from adapters.format import read_adapter, write_adapter
from adapters.peft import TENSOR_FILE, export_peft, import_peft
from model.checkpoint import Backbone, read_backbone
from model.config import GPTConfig
from model.gpt import GPT


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return make_backbone(tmp_path_factory.mktemp("deep") / "deep", DEEP)


@pytest.fixture(scope="module")
def tiny(tiny_backbone: Path) -> Backbone:
    return read_backbone(tiny_backbone)


TRAININGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEARS},
    "one site in some layers": {
        "r": 3,
        "lora_alpha": 5.5,
        "target_modules": ["c_attn"],
        "layers_to_transform": [1, 10],
        "layers_pattern": "h",
    },
    "ranks and alphas by pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL_LINEARS,
        "rank_pattern": {"h.1.attn.c_attn": 2, r"mlp\.c_proj": 7, "c_fc": 1},
        "alpha_pattern": {r"h\.1\.mlp\.c_fc": 3.3, "attn.c_proj": 32, "h.11.attn.c_attn": 1},
    },
    "rslora with patterns": {
        "r": 4,
        "lora_alpha": 2,
        "use_rslora": True,
        "target_modules": ALL_LINEARS,
        "rank_pattern": {"c_attn": 6},
        "alpha_pattern": {"c_fc": 0.7},
    },
    "norms and heads": {
        "r": 2,
        "target_modules": r"transformer\.h\.[0-3]\.(attn|mlp)\.c_.*",
        "modules_to_save": ["h.1.ln_1", "ln_2", "ln_f", "critic_head", "sequence_head"],
    },
}


@pytest.fixture(scope="module", params=TRAININGS)
def trained(
    request: pytest.FixtureRequest, deep: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPT, Path]:
    """A model under peft, and the folder with the file imported of what peft saved."""
    folder = tmp_path_factory.mktemp("trained")
    gpt = trained_by_peft(deep, folder / "peft", **TRAININGS[request.param])
    import_peft(folder / "peft", deep, folder / "a.safetensors")
    return gpt, folder


def test_what_peft_saved_is_served_as_peft_computes_it(
    trained: tuple[GPT, Path], deep: Backbone
) -> None:
    gpt, folder = trained
    judged = peft_answers(gpt)
    assert_same(served_answers(deep, read_adapter(folder / "a.safetensors")), judged)
    base = peft_answers(gpt_of(deep))
    assert (judged[0] - base[0]).norm() > 0.01 * base[0].norm()


def test_what_came_from_peft_goes_back_to_the_same_answers(
    trained: tuple[GPT, Path], deep: Backbone
) -> None:
    gpt, folder = trained
    assert export_peft(folder / "a.safetensors", deep, folder / "back") == []
    assert_same(peft_answers(loaded_by_peft(deep, folder / "back")), peft_answers(gpt))


RANKS = {
    (layer, site): 1 + (5 * layer + len(site)) % 7
    for layer in (0, 1, 2, 10, 11)
    for site in ("attn.lora_qkv", "attn.lora_out", "mlp.lora_fc", "mlp.lora_proj")
    if (layer, site) != (1, "mlp.lora_fc")
}


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_an_export_as_it_is_served(rslora: bool, deep: Backbone, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    adapter = write_set(file, deep, rslora, ranks=RANKS, norms=True, critic=True)
    assert export_peft(file, deep, tmp_path / "peft") == []
    judged = peft_answers(loaded_by_peft(deep, tmp_path / "peft"))
    assert_same(served_answers(deep, adapter), judged)


def test_an_export_loads_onto_a_gpt_with_lora_of_its_own(tiny: Backbone, tmp_path: Path) -> None:
    adapter = write_set(tmp_path / "a.safetensors", tiny, norms=True)
    export_peft(tmp_path / "a.safetensors", tiny, tmp_path / "peft")
    judged = peft_answers(loaded_by_peft(tiny, tmp_path / "peft"))
    assert_same(served_answers(tiny, adapter), judged)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(DEEP, n_layer=2, bias=False),
        dataclasses.replace(DEEP, n_layer=2, share_main_matrices=False),
    ],
    ids=["no biases", "unshared"],
)
def test_other_trunks_go_both_ways(config: GPTConfig, tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "trunk", config)
    file = tmp_path / "a.safetensors"
    gpt = trained_by_peft(
        backbone, tmp_path / "peft", target_modules=ALL_LINEARS, modules_to_save=["ln_1", "ln_f"]
    )
    import_peft(tmp_path / "peft", backbone, file)
    assert_same(served_answers(backbone, read_adapter(file)), peft_answers(gpt))
    export_peft(file, backbone, tmp_path / "back")
    assert_same(peft_answers(loaded_by_peft(backbone, tmp_path / "back")), peft_answers(gpt))


def test_an_exported_set_comes_back_as_the_same_bytes(deep: Backbone, tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write_set(first, deep, rslora=True, ranks=RANKS, norms=True, critic=True, sequence=True)
    export_peft(first, deep, tmp_path / "peft")
    import_peft(tmp_path / "peft", deep, second)
    assert first.read_bytes() == second.read_bytes()


def test_alphas_that_differ_are_folded_by_one_rounding(deep: Backbone, tmp_path: Path) -> None:
    trained_by_peft(
        deep,
        tmp_path / "peft",
        r=4,
        lora_alpha=8,
        target_modules=ALL_LINEARS,
        alpha_pattern={"h.0.attn.c_attn": 16, "h.1.attn.c_attn": 3},
    )
    import_peft(tmp_path / "peft", deep, tmp_path / "a.safetensors")
    saved = load_file(tmp_path / "peft" / TENSOR_FILE)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.lora_alpha == 8
    for layer, ratio in ((0, 2), (1, 3 / 8), (2, 1)):
        b = saved[f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_B.weight"]
        folded = adapter.tensors[f"transformer.h.{layer}.attn.lora_qkv.B.weight"]
        torch.testing.assert_close(folded, (b.double() * ratio).float(), rtol=0, atol=0)


def test_an_alpha_that_all_sites_share_folds_nothing(deep: Backbone, tmp_path: Path) -> None:
    trained_by_peft(deep, tmp_path / "peft", target_modules=["c_attn"], alpha_pattern={"c_attn": 3})
    import_peft(tmp_path / "peft", deep, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").lora_alpha == 3


def test_what_peft_has_no_place_for_is_listed(tiny: Backbone, tmp_path: Path) -> None:
    tensors = random_adapter(TINY, 1, critic=True, classes=2) | {"calibration": torch.ones(100)}
    metadata = {"labels": '["no", "yes"]'}
    file = tmp_path / "a.safetensors"
    write_adapter(file, tensors, lora_alpha=8, base_digest=tiny.digest, metadata=metadata)
    assert export_peft(file, tiny, tmp_path / "peft") == [
        "calibration",
        "classifier.bias",
        "classifier.weight",
    ]
    loaded_by_peft(tiny, tmp_path / "peft")


def test_a_critic_goes_only_where_the_gpt_has_one(tmp_path: Path) -> None:
    config = dataclasses.replace(DEEP, n_layer=2, add_critic_head=False)
    backbone = make_backbone(tmp_path / "trunk", config)
    write_set(tmp_path / "a.safetensors", backbone, critic=True)
    dropped = export_peft(tmp_path / "a.safetensors", backbone, tmp_path / "peft")
    assert dropped == ["critic_head.weight"]
    loaded_by_peft(backbone, tmp_path / "peft")
