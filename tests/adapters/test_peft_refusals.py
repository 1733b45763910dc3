"""What a PEFT folder says that an adapter set can't: refused by name, with one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_judge import ALL_LINEARS, DEEP, make_backbone, trained_by_peft, write_set
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.errors import Invalid
from adapters.peft import CONFIG_FILE, TENSOR_FILE, PeftRefused, export_peft, import_peft
from model.checkpoint import Backbone, read_backbone


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return make_backbone(tmp_path_factory.mktemp("deep") / "deep", DEEP)


@pytest.fixture(scope="module")
def tiny(tiny_backbone: Path) -> Backbone:
    return read_backbone(tiny_backbone)


@pytest.fixture(scope="module")
def peft_folder(deep: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    trained_by_peft(deep, folder, r=4, target_modules=ALL_LINEARS)
    return folder


def changed_folder(
    peft_folder: Path, out: Path, fields: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> Path:
    out.mkdir()
    config = json.loads((peft_folder / CONFIG_FILE).read_text())
    (out / CONFIG_FILE).write_text(json.dumps(config | fields))
    save_file(load_file(peft_folder / TENSOR_FILE) | (tensors or {}), out / TENSOR_FILE)
    return out


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"target_parameters": ["wte.weight"]}, "target_parameters is set"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
        ({"something_new": {"a": 1}}, "something_new is set"),
        ({"bias": "lora_only"}, "bias is lora_only"),
        ({"bias": "all"}, "bias is all"),
        ({"peft_type": "VERA"}, "peft_type is VERA"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is PROMPT_TUNING"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is olora"),
        ({"r": 5}, "has rank 4, but adapter_config.json says 5"),
        ({"r": 0}, "the rank r must"),
        ({"r": True}, "the rank r must"),
        ({"rank_pattern": {"c_fc": 2}}, "h.0.mlp.c_fc has rank 4, but .* says 2"),
        ({"rank_pattern": {"c_fc": "4"}}, "the rank c_fc must"),
        ({"lora_alpha": 0}, "the alpha lora_alpha must"),
        ({"lora_alpha": float("nan")}, "the alpha lora_alpha must"),
        ({"alpha_pattern": {"c_fc": None}}, "the alpha c_fc must"),
        ({"alpha_pattern": {"c_(": 4}}, "not understood"),
        ({"alpha_pattern": {"(?=c_fc)": 4}}, "not understood"),
        ({"rank_pattern": {"(a|b)" * 250: 4}}, "1000 characters"),
        ({"lora_alpha": 10**400}, "the alpha lora_alpha must"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
    ],
    ids=str,
)
def test_a_config_that_cant_be_expressed_is_refused_by_name(
    fields: dict[str, Any], sentence: str, peft_folder: Path, deep: Backbone, tmp_path: Path
) -> None:
    folder = changed_folder(peft_folder, tmp_path / "peft", fields)
    with pytest.raises(PeftRefused, match=sentence) as refused:
        import_peft(folder, deep, tmp_path / "a.safetensors")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["wte"]}, "LoRA on transformer.wte can't"),
        ({"target_modules": ["c_attn", "critic_head"]}, "LoRA on critic_head can't"),
        ({"target_modules": ["base_predictor"]}, "LoRA on sequence_head.base_predictor can't"),
        ({"modules_to_save": ["mlp"], "target_modules": ["c_attn"]}, "c_fc.* can't be saved"),
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "all"}, "bias is all"),
    ],
    ids=str,
)
def test_what_peft_trained_elsewhere_is_refused_by_name(
    options: dict[str, Any], sentence: str, deep: Backbone, tmp_path: Path
) -> None:
    trained_by_peft(deep, tmp_path / "peft", **{"target_modules": ["c_attn"]} | options)
    with pytest.raises(PeftRefused, match=sentence):
        import_peft(tmp_path / "peft", deep, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["c_attn.lora_magnitude_vector", "attn.rotary.weight"])
def test_a_strange_tensor_is_refused_by_name(
    name: str, peft_folder: Path, deep: Backbone, tmp_path: Path
) -> None:
    strange = {f"base_model.model.transformer.h.0.{name}": torch.ones(4)}
    folder = changed_folder(peft_folder, tmp_path / "peft", {}, strange)
    with pytest.raises(PeftRefused, match=name.partition(".lora_")[0]):
        import_peft(folder, deep, tmp_path / "a.safetensors")


@pytest.mark.parametrize("broken", [CONFIG_FILE, TENSOR_FILE])
def test_a_folder_without_one_of_its_files_is_refused(
    broken: str, peft_folder: Path, deep: Backbone, tmp_path: Path
) -> None:
    folder = changed_folder(peft_folder, tmp_path / "peft", {})
    (folder / broken).unlink()
    with pytest.raises(PeftRefused, match=f"{broken} can't be read: No such file"):
        import_peft(folder, deep, tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(
    text: str, peft_folder: Path, deep: Backbone, tmp_path: Path
) -> None:
    folder = changed_folder(peft_folder, tmp_path / "peft", {})
    (folder / CONFIG_FILE).write_text(text, "latin-1")
    with pytest.raises(PeftRefused, match=r"adapter_config\.json (is not JSON|must hold)"):
        import_peft(folder, deep, tmp_path / "a.safetensors")


def test_tensors_of_another_trunk_are_refused(
    peft_folder: Path, deep: Backbone, tiny: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(Invalid, match="the backbone has 2 layers"):
        import_peft(peft_folder, tiny, tmp_path / "a.safetensors")
    write_set(tmp_path / "b.safetensors", tiny)
    with pytest.raises(Invalid, match="another backbone"):
        export_peft(tmp_path / "b.safetensors", deep, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_peft(tmp_path / "b.safetensors", tiny, tmp_path / "out")
    with pytest.raises(Invalid, match="another backbone"):
        import_peft(tmp_path / "out", deep, tmp_path / "c.safetensors")


def test_a_set_without_lora_is_not_exported(tiny: Backbone, tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", tiny, ranks={}, norms=True)
    with pytest.raises(PeftRefused, match="has no LoRA tensors"):
        export_peft(tmp_path / "a.safetensors", tiny, tmp_path / "peft")
