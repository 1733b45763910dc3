"""Training checkpoints in: the first of a trunk, further ones, and what is refused."""

import errno
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KIT
from safetensors.torch import load_file

from adapters.errors import ImportRefused, TrunklineError
from adapters.format import read_adapter
from adapters.importers import Options, import_checkpoint
from adapters.names import check_name
from adapters.validate import validate
from model.checkpoint import read_backbone
from model.config import LORA_SITES

META = KIT / "meta.pkl"
Saved = dict[str, Any]


def kit(name: str = "a") -> Saved:
    return torch.load(KIT / f"ckpt_{name}.pt", weights_only=True)


def save(path: Path, checkpoint: object) -> Path:
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A folder that holds the kit's first checkpoint."""
    import_checkpoint(KIT / "ckpt_a.pt", META, tmp_path / "trunk")
    return tmp_path / "trunk"


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_first_checkpoint_makes_a_backbone_and_an_adapter_of_its_lora_alone(
    tmp_path: Path,
) -> None:
    out = tmp_path / "shakespeare"
    imported = import_checkpoint(KIT / "ckpt_a.pt", META, out)
    assert imported.backbone == out
    assert imported.adapter == out / "adapters" / "ckpt_a.safetensors"
    assert imported.dropped == ["sequence_head.temperature"]
    state, backbone = kit()["model"], read_backbone(out)
    assert backbone.id == "shakespeare"
    shared = "attn.c_attn.weight"
    assert torch.equal(backbone.tensors[f"shared.{shared}"], state[f"transformer.h.3.{shared}"])
    adapter = read_adapter(imported.adapter)
    assert set(adapter.tensors) == {
        f"transformer.h.{layer}.{site}.{matrix}.weight"
        for layer in range(4)
        for site in LORA_SITES
        for matrix in "AB"
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter.tensors.items())
    assert adapter.lora_alpha == 16.0
    assert adapter.metadata["base_digest"] == backbone.digest


def test_a_second_checkpoint_adds_its_adapter_with_what_else_differs_and_nothing_more(
    first: Path,
) -> None:
    before = files(first)
    imported = import_checkpoint(KIT / "ckpt_b.pt", META, first)
    assert imported.backbone is None
    after = files(first)
    assert set(after) - set(before) == {"adapters/ckpt_b.safetensors"}
    assert {name: after[name] for name in before} == before
    a, b = read_adapter(first / "adapters" / "ckpt_a.safetensors"), read_adapter(imported.adapter)
    own = set(b.tensors) - set(a.tensors)
    assert own == {
        f"transformer.h.{layer}.ln_{norm}.{part}"
        for layer in range(4)
        for norm in (1, 2)
        for part in ("weight", "bias")
    }
    state = kit("b")["model"]
    assert all(torch.equal(t, state[f"_orig_mod.{n}"]) for n, t in b.tensors.items())


def test_a_layernorm_of_which_only_the_weight_differs_travels_whole(
    first: Path, tmp_path: Path
) -> None:
    """A file with half of one is refused by the server."""
    saved = kit()
    name = "transformer.h.1.ln_2"
    saved["model"][f"{name}.weight"] = saved["model"][f"{name}.weight"] + 0.5
    imported = import_checkpoint(save(tmp_path / "half.pt", saved), META, first)
    carried = read_adapter(imported.adapter).tensors
    assert {n for n in carried if ".ln_" in n} == {f"{name}.weight", f"{name}.bias"}
    assert torch.equal(carried[f"{name}.bias"], saved["model"][f"{name}.bias"])


def test_imported_adapters_pass_the_server_s_own_check(kit_backbone: Path) -> None:
    backbone = read_backbone(kit_backbone)
    for name in ("ckpt_a", "ckpt_b"):
        adapter = read_adapter(kit_backbone / "adapters" / f"{name}.safetensors")
        manifest = validate(adapter, backbone.config, backbone.digest, torch.float32)
        assert manifest.rank == 8


def test_the_same_import_gives_the_same_bytes(first: Path, tmp_path: Path) -> None:
    """But for the order of the backbone file's header: the digest is what names it."""
    again = tmp_path / "again"
    import_checkpoint(KIT / "ckpt_a.pt", META, again)
    adapter = "adapters/ckpt_a.safetensors"
    assert files(again)[adapter] == files(first)[adapter]
    assert read_backbone(again).digest == read_backbone(first).digest


def test_the_order_of_two_checkpoints_does_not_change_what_either_means(tmp_path: Path) -> None:
    """b first: then the backbone has b's LayerNorms, and a's adapter carries its own."""
    out = tmp_path / "trunk"
    for name in ("b", "a"):
        import_checkpoint(KIT / f"ckpt_{name}.pt", META, out)
    state = kit()["model"]
    carried = read_adapter(out / "adapters" / "ckpt_a.safetensors").tensors
    norm = "transformer.h.2.ln_1.weight"
    assert torch.equal(carried[norm], state[norm])


# Names.


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("ckpt_b", "ckpt_b"),
        ("My Model (v2)", "my-model-v2"),
        ("..hidden", "hidden"),
        ("a..b", "a-b"),
        ("Ünïcode", "n-code"),
        ("___", "adapter"),
        ("x" * 100, "x" * 64),
        ("x" * 63 + ".-y", None),
        pytest.param("base", None),
        ("load", None),
    ],
)
def test_the_default_name_is_the_stem_made_valid(
    tmp_path: Path, stem: str, name: str | None
) -> None:
    ckpt = save(tmp_path / f"{stem}.pt", kit())
    imported = import_checkpoint(ckpt, META, tmp_path / "trunk")
    check_name(imported.adapter.stem)
    assert name is None or imported.adapter.stem == name


def test_a_name_that_can_t_be_one_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError):
        import_checkpoint(KIT / "ckpt_a.pt", META, tmp_path / "trunk", name="../a")
    assert list(tmp_path.iterdir()) == []


def test_a_name_with_a_namespace_is_a_file_in_a_folder(tmp_path: Path) -> None:
    imported = import_checkpoint(KIT / "ckpt_a.pt", META, tmp_path / "trunk", name="team/a")
    assert imported.adapter == tmp_path / "trunk" / "adapters" / "team" / "a.safetensors"


# Refusals: a sentence, and nothing written.


def refused(ckpt: Path, out: Path, sentence: str, meta: Path = META) -> str:
    """Checks that the import is refused, and that it leaves `out` as it was."""
    before = files(out) if out.exists() else None
    with pytest.raises(ImportRefused, match=sentence) as error:
        import_checkpoint(ckpt, meta, out)
    assert (files(out) if out.exists() else None) == before
    return str(error.value)


def changed(saved: Saved, name: str, by: float = 1.0) -> Saved:
    """With one tensor changed; where layers share it, in all of them."""
    for other in saved["model"]:
        if other.endswith(name):
            saved["model"][other] = saved["model"][other] + by
    return saved


@pytest.mark.parametrize("name", ["mlp.c_fc.weight", "attn.c_proj.bias", "wte.weight"])
def test_a_checkpoint_of_another_trunk_is_refused_by_the_tensor_and_told_what_to_do(
    first: Path, tmp_path: Path, name: str
) -> None:
    other = changed(kit("b"), name)
    if name == "wte.weight":  # the same tensor
        changed(other, "lm_head.weight")
    sentence = refused(
        save(tmp_path / "other.pt", other), first, rf"{name} differs .* another trunk"
    )
    assert "trains trunk and LoRA together" in sentence
    assert "trunk frozen" in sentence
    assert "another --out" in sentence
    assert ("freeze_transformer leaves lm_head trainable" in sentence) == (name == "wte.weight")


@pytest.mark.parametrize("name", ["cls_embedding", "sequence_head.A"])
def test_a_scorer_trained_on_the_frozen_trunk_is_an_adapter_that_carries_it(
    first: Path, tmp_path: Path, name: str
) -> None:
    """The training script's second stage; a sequence head travels whole."""
    saved = changed(without_lora(kit()), name)
    imported = import_checkpoint(save(tmp_path / "scorer.pt", saved), META, first)
    carried = read_adapter(imported.adapter).tensors
    head = {"sequence_head.A", "sequence_head.B", "sequence_head.base_predictor.weight"}
    assert set(carried) == ({"cls_embedding"} if name == "cls_embedding" else head)
    assert torch.equal(carried[name], saved["model"][name])


def test_a_second_checkpoint_in_which_nothing_differs_is_refused(
    first: Path, tmp_path: Path
) -> None:
    ckpt = save(tmp_path / "same.pt", without_lora(kit()))
    refused(ckpt, first, "nothing in it differs from the trunk")


def test_a_second_checkpoint_without_a_critic_is_taken_and_it_is_said_whose_answers(
    first: Path, tmp_path: Path
) -> None:
    saved = without_tensor("critic_head.weight")(kit())
    saved["model_args"]["add_critic_head"] = False
    imported = import_checkpoint(save(tmp_path / "plain.pt", saved), META, first)
    assert "the set has no critic_head: the trunk's is used" in imported.notes


def test_trunk_only_into_the_folder_of_another_trunk_is_refused(
    first: Path, tmp_path: Path
) -> None:
    ckpt = save(tmp_path / "other.pt", changed(kit(), "critic_head.weight"))
    before = files(first)
    with pytest.raises(ImportRefused, match=r"critic_head\.weight differs"):
        import_checkpoint(ckpt, META, first, options=Options(trunk_only=True))
    assert files(first) == before


def test_a_checkpoint_with_another_number_of_heads_is_of_another_trunk(
    first: Path, tmp_path: Path
) -> None:
    """Every tensor has the same shape, and the model is another."""
    other = kit("b")
    other["model_args"]["n_head"] = 2
    refused(save(tmp_path / "other.pt", other), first, "n_head")


def test_shared_matrices_that_are_not_equal_are_refused(tmp_path: Path) -> None:
    saved = kit()
    name = "transformer.h.2.mlp.c_proj.weight"
    saved["model"][name] = saved["model"][name] + 1e-3
    ckpt = save(tmp_path / "uneven.pt", saved)
    refused(ckpt, tmp_path / "out", r"mlp\.c_proj\.weight of layer 2 differs")


def without_lora(saved: Saved) -> Saved:
    saved["model"] = {n: t for n, t in saved["model"].items() if ".lora_" not in n}
    return saved


def with_guidance(saved: Saved) -> Saved:
    saved["model_args"]["use_guidance"] = True
    return saved


def with_args(**args: object) -> Any:
    return lambda saved: saved | {"model_args": saved["model_args"] | args}


def without_tensor(name: str) -> Any:
    return lambda saved: saved | {"model": {n: t for n, t in saved["model"].items() if n != name}}


def with_nan(saved: Saved) -> Saved:
    saved["model"]["transformer.ln_f.weight"][0] = torch.nan
    return saved


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_lora, "no LoRA tensors.*--trunk-only"),
        (with_guidance, "guidance"),
        (with_args(n_heads=4), "'n_heads'"),
        (with_args(n_head=3), "n_head 3"),
        (with_args(mask_token_id=5), "disagree about mask_token_id"),
        (without_tensor("transformer.h.1.ln_2.bias"), r"no transformer\.h\.1\.ln_2\.bias"),
        (with_nan, r"ln_f\.weight has values that are not finite"),
        (lambda saved: {"model": saved["model"]}, "no model and model_args"),
        (lambda saved: [1, 2], "holds a list"),
        (lambda saved: saved["model"]["cls_embedding"], "holds a Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_that_can_t_be_served_is_refused_with_the_reason(
    tmp_path: Path, change: Any, sentence: str
) -> None:
    ckpt = save(tmp_path / "odd.pt", change(kit()))
    refused(ckpt, tmp_path / "out", sentence)


def test_unused_guidance_tensors_are_dropped_and_listed(tmp_path: Path) -> None:
    saved = kit()
    unused = ("transformer.h.0.cross.c_attn.weight", "transformer.h.0.ln_cross.weight")
    saved["model"] |= {name: torch.ones(3) for name in (*unused, "plan_encoder.emb.weight")}
    saved["model_args"] |= {"plan_len": 4}
    ckpt = save(tmp_path / "unused.pt", saved)
    imported = import_checkpoint(ckpt, META, tmp_path / "out")
    assert {*unused, "plan_encoder.emb.weight"} < set(imported.dropped)
    assert not set(unused) & set(load_file(tmp_path / "out" / "backbone.safetensors"))


# Files that are no data: nothing in them is run.


class Bomb:
    """Pickled, it is a call of os.mkdir(path)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["beside the model", "as the whole"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_asks_for_a_global_is_refused_by_its_name_and_not_run(
    tmp_path: Path, where: str, zipped: bool
) -> None:
    bomb = Bomb(tmp_path / "ran")
    ckpt = tmp_path / "bomb.pt"
    content = kit() | {"config": bomb} if where == "beside the model" else bomb
    torch.save(content, ckpt, _use_new_zipfile_serialization=zipped)
    refused(ckpt, tmp_path / "out", r"asks for \w+\.mkdir")
    assert not (tmp_path / "ran").exists()


def test_a_meta_file_that_asks_for_a_global_is_refused_by_its_name_and_not_run(
    tmp_path: Path,
) -> None:
    meta = tmp_path / "meta.pkl"
    meta.write_bytes(pickle.dumps({"stoi": Bomb(tmp_path / "ran")}))
    refused(KIT / "ckpt_a.pt", tmp_path / "out", r"meta\.pkl asks for \w+\.mkdir", meta)
    assert not (tmp_path / "ran").exists()


def zip_of_text() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "no tensors here")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"no pickle", zip_of_text(), b"\x80\x04"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "junk.pt").write_bytes(content)
    refused(tmp_path / "junk.pt", tmp_path / "out", "not a checkpoint of torch")
    refused(tmp_path / "none.pt", tmp_path / "out", "does not exist")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stoi": None}, "no vocabulary stoi"),
        ({"stoi": {"a": 0, "b": 2}}, "without a gap"),
        ({"stoi": {"a": 0, "bc": 1}, "mask_token_id": None}, "disagree"),
        ({"pad_token_id": 3}, "disagree about pad_token_id"),
    ],
)
def test_a_meta_file_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    meta = tmp_path / "meta.pkl"
    meta.write_bytes(pickle.dumps(pickle.loads(META.read_bytes()) | change))
    refused(KIT / "ckpt_a.pt", tmp_path / "out", sentence, meta)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"not a pickle"])
def test_a_meta_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    meta = tmp_path / "meta.pkl"
    meta.write_bytes(content)
    refused(KIT / "ckpt_a.pt", tmp_path / "out", r"meta\.pkl", meta)


@pytest.mark.parametrize("part", ["model", "model_args"])
def test_a_checkpoint_whose_parts_are_no_mappings_is_refused(tmp_path: Path, part: str) -> None:
    ckpt = save(tmp_path / "odd.pt", kit() | {part: [1, 2, 3]})
    refused(ckpt, tmp_path / "out", part)


def test_a_checkpoint_whose_model_holds_more_than_tensors_is_refused(tmp_path: Path) -> None:
    saved = kit()
    saved["model"]["transformer.ln_f.weight"] = "text"
    refused(save(tmp_path / "odd.pt", saved), tmp_path / "out", r"ln_f\.weight")


def test_special_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    meta, saved = pickle.loads(META.read_bytes()), kit()
    meta["mask_token_id"] = saved["model_args"]["mask_token_id"] = 500
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    refused(save(tmp_path / "odd.pt", saved), tmp_path / "out", "500", tmp_path / "meta.pkl")


# The disk: whole, or nothing.


@pytest.mark.parametrize("what", ["backbone.safetensors", "config.json", "ckpt_a.safetensors"])
@pytest.mark.parametrize("beside", [False, True], ids=["new folder", "folder with other files"])
def test_a_disk_that_fills_leaves_nothing_of_an_import(
    tmp_path: Path, what: str, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "some" / "where" / "trunk"
    if beside:
        out.mkdir(parents=True)
        (out / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    replace = os.replace

    def full(path: Path | str, target: Path | str) -> None:
        if Path(target).name == what and (not beside or out in Path(target).parents):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        replace(path, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ImportRefused, match="No space left on device; nothing was written"):
        import_checkpoint(KIT / "ckpt_a.pt", META, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_other_files_and_a_link_to_an_empty_one_are_taken(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("full", "link"):
        import_checkpoint(KIT / "ckpt_a.pt", META, tmp_path / name)
        assert read_backbone(tmp_path / name).digest == read_backbone(tmp_path / "full").digest
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "link"]
