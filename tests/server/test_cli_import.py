"""`trunkline import`: what it prints, and what it refuses, in one sentence each with exit 1."""

import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import CHARACTERS, TINY
from safetensors.torch import save_file
from train_py import Saved, meta_of, saved_by_train_py, write

from adapters.format import read_adapter
from model.checkpoint import read_backbone
from server.cli import main

LORA = "transformer.h.1.attn.lora_qkv"
TABLE = [round(i / 100, 2) for i in range(100)]


def run(ckpt: Path, out: Path, *options: str | Path) -> Result:
    arguments = ["import", ckpt, "--out", out, *options]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write(tmp_path / "ckpt_MLM_10.pt", saved_by_train_py())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "trunk"


def test_the_checkpoint_alone_is_enough_and_what_was_dropped_is_listed(
    ckpt: Path, out: Path
) -> None:
    done = run(ckpt, out)
    assert done.exit_code == 0, done.output
    assert (out / "adapters" / "ckpt_mlm_10.safetensors").is_file()
    assert "vocabulary: the checkpoint's own config" in done.output
    assert "cond_dropout_prob, critic_target_scope, end_critic_iteration" in done.output
    assert "sequence_head.temperature" in done.output
    assert f"trunkline serve {out}" in done.output


# The vocabulary: where it is found without --meta.


def without_own_meta(saved: Saved) -> Saved:
    return saved | {"config": {"dataset": "char_diffusion"}}


@pytest.mark.parametrize("beside", ["meta.pkl", "meta_MLM_10.pkl"])
def test_a_meta_file_beside_the_checkpoint_is_found(tmp_path: Path, out: Path, beside: str) -> None:
    ckpt = write(tmp_path / "ckpt_MLM_10.pt", without_own_meta(saved_by_train_py()))
    (tmp_path / beside).write_bytes(pickle.dumps(meta_of(TINY)))
    if beside != "meta.pkl":  # the one of the checkpoint's own name, before others
        (tmp_path / "meta.pkl").write_bytes(b"of another")
    done = run(ckpt, out)
    assert done.exit_code == 0, done.output
    assert beside in done.output


def test_a_cls_token_that_the_run_added_has_a_text_although_the_meta_lacks_it(
    tmp_path: Path, out: Path
) -> None:
    saved = saved_by_train_py()
    meta = saved["config"]["meta"]
    del meta["stoi"]["[CLS]"], meta["itos"][TINY.cls_token_id], meta["cls_token_id"]
    meta["vocab_size"] -= 1
    done = run(write(tmp_path / "scorer.pt", saved), out)
    assert done.exit_code == 0, done.output
    assert read_backbone(out).tokenizer.encode("[CLS]a").ids[0] == TINY.cls_token_id


def test_a_trunk_with_more_ids_than_the_vocabulary_is_taken_and_it_is_said(
    tmp_path: Path, out: Path
) -> None:
    saved = saved_by_train_py()
    del saved["config"]["meta"]["vocab_size"]
    saved["config"]["meta"]["stoi"].pop("[CLS]")
    saved["config"]["meta"]["stoi"].pop("[PAD]")
    saved["config"]["meta"]["itos"] = None
    saved["config"]["meta"] |= {"pad_token_id": TINY.pad_token_id}
    done = run(write(tmp_path / "wide.pt", saved), out)
    assert done.exit_code == 0, done.output
    assert "the ids behind them have no text" in done.output


# Calibration.


@pytest.mark.parametrize(
    ("entries", "taken"),
    [
        (["out/ckpt_MLM_10.pt"], "out/ckpt_MLM_10.pt"),
        (["C:\\runs\\out\\ckpt_MLM_10.pt", "out/ckpt.pt"], "C:\\runs\\out\\ckpt_MLM_10.pt"),
        (["{ckpt}", "out/ckpt_MLM_10.pt", "b/ckpt_MLM_10.pt"], "{ckpt}"),
        (["a/ckpt_MLM_10.pt", "b/ckpt_MLM_10.pt"], None),
        (["out/ckpt.pt"], None),
        ([], None),
    ],
)
def test_the_calibration_beside_the_checkpoint_is_taken_where_one_entry_fits(
    ckpt: Path, out: Path, entries: list[str], taken: str | None
) -> None:
    keys = [entry.format(ckpt=ckpt) for entry in entries]
    tables = {key: [0.0] * 99 + [number / 10] for number, key in enumerate(keys)}
    (ckpt.parent / "calibration.json").write_text(json.dumps(tables))
    done = run(ckpt, out)
    assert done.exit_code == 0, done.output
    carried = read_adapter(out / "adapters" / "ckpt_mlm_10.safetensors").tensors
    if taken is None:
        assert "no calibration was taken" in done.output
        assert "calibration" not in carried
    else:
        key = taken.format(ckpt=ckpt)
        assert f"calibration: entry {key}" in done.output
        torch.testing.assert_close(carried["calibration"], torch.tensor(tables[key]))


def test_names_that_are_no_text_are_told_all_the_same(ckpt: Path, out: Path) -> None:
    (ckpt.parent / "calibration.json").write_text(json.dumps({"\ud800": TABLE}))
    done = run(ckpt, out)
    assert done.exit_code == 0
    assert "\\ud800" in done.output


def test_with_trunk_only_the_calibration_is_the_trunk_s(ckpt: Path, out: Path) -> None:
    (ckpt.parent / "calibration.json").write_text(json.dumps({str(ckpt): TABLE}))
    assert run(ckpt, out, "--trunk-only").exit_code == 0
    calibration = read_backbone(out).calibration
    assert calibration is not None
    torch.testing.assert_close(calibration, torch.tensor(TABLE))


def test_no_calibration_leaves_a_broken_file_alone(ckpt: Path, out: Path) -> None:
    (ckpt.parent / "calibration.json").write_text("{")
    assert run(ckpt, out).exit_code == 1
    assert run(ckpt, out, "--no-calibration").exit_code == 0


def test_an_unknown_key_is_dropped_where_it_is_named(tmp_path: Path, out: Path) -> None:
    saved = saved_by_train_py()
    saved["model_args"] |= {"film_rank": 4, "sampler": "ddim", "router": None, "experts": 0}
    ckpt = write(tmp_path / "ckpt.pt", saved)
    refused = run(ckpt, out)
    assert "--ignore-key film_rank --ignore-key sampler" in refused.output
    done = run(ckpt, out, "--ignore-key", "film_rank", "--ignore-key", "sampler")
    assert done.exit_code == 0, done.output
    for key in ("film_rank", "sampler", "router", "experts"):  # the last two without being named
        assert key in done.output


def test_that_another_set_was_replaced_is_said(tmp_path: Path, out: Path) -> None:
    saved = saved_by_train_py()
    first = run(write(tmp_path / "ckpt.pt", saved), out)
    again = run(tmp_path / "ckpt.pt", out)
    saved["model"][f"{LORA}.B.weight"] *= 2
    other = run(write(tmp_path / "ckpt.pt", saved), out)
    assert [done.exit_code for done in (first, again, other)] == [0, 0, 0], other.output
    sentence = f"replaced: {out / 'adapters' / 'ckpt.safetensors'} held another set"
    assert [sentence in done.output for done in (first, again, other)] == [False, False, True]


# Refusals. Each makes a checkpoint and what else is needed, and returns the command's arguments.

Case = Callable[[Path], tuple[str | Path, ...]]


def checkpoint(change: Callable[[Saved], Any]) -> Case:
    """A checkpoint that `change` altered in place, or what it returned."""

    def make(folder: Path) -> tuple[str | Path, ...]:
        saved = saved_by_train_py()
        return (write(folder / "ckpt.pt", change(saved) or saved), "--out", folder / "trunk")

    return make


def tensors(**changes: Any) -> Case:
    """Tensors by name with __ for a dot; None takes one away."""

    def change(saved: Saved) -> None:
        for name, value in changes.items():
            saved["model"].pop(name.replace("__", "."))
            if value is not None:
                saved["model"][name.replace("__", ".")] = value

    return checkpoint(change)


def args(**changes: Any) -> Case:
    return checkpoint(lambda saved: saved["model_args"].update(changes))


def meta(change: Callable[[dict[str, Any]], Any]) -> Case:
    """With a meta file that `change` altered, beside a checkpoint without its own."""

    def make(folder: Path) -> tuple[str | Path, ...]:
        ckpt = write(folder / "ckpt.pt", without_own_meta(saved_by_train_py()))
        altered = meta_of(TINY)
        content = change(altered) or altered
        (folder / "given.pkl").write_bytes(pickle.dumps(content))
        return (ckpt, "--out", folder / "trunk", "--meta", folder / "given.pkl")

    return make


def sound(*options: str) -> Case:
    """A sound checkpoint, with options in which {} is the test's folder."""

    def make(folder: Path) -> tuple[str | Path, ...]:
        (folder / "file").write_text("a file")
        (folder / "broken.json").write_text('{"a": ')
        (folder / "list.json").write_text("[1, 2]")
        (folder / "short.json").write_text(json.dumps({"out/ckpt.pt": [0.5] * 99}))
        (folder / "huge.json").write_text(json.dumps({"out/ckpt.pt": [10**400] * 100}))
        (folder / "infinite.json").write_text(json.dumps({"out/ckpt.pt": [math.inf] * 100}))
        (folder / "none.json").write_text(json.dumps({"out/other.pt": TABLE}))
        (folder / "ckpt.pt.safetensors").write_text("")
        given = [option.format(folder) for option in options]
        where = [] if "--out" in given else ["--out", str(folder / "trunk")]
        return (write(folder / "ckpt.pt", saved_by_train_py()), *where, *given)

    return make


def file(content: Callable[[Path], object]) -> Case:
    """Something else under the name of a checkpoint."""

    def make(folder: Path) -> tuple[str | Path, ...]:
        content(folder / "ckpt.pt")
        return (folder / "ckpt.pt", "--out", folder / "trunk")

    return make


class Custom:
    """A class of the training code, which a checkpoint refers to."""


def lose_lora(saved: Saved) -> None:
    for name in [name for name in saved["model"] if ".lora_" in name]:
        del saved["model"][name]


def zero_b(saved: Saved) -> None:
    for name, tensor in saved["model"].items():
        if ".lora_" in name and ".B." in name:
            tensor.zero_()


def only_lora(saved: Saved) -> None:
    saved["model"] = {n: t for n, t in saved["model"].items() if ".lora_" in n}


def uneven(saved: Saved) -> None:
    saved["model"]["transformer.h.1.mlp.c_fc.bias"] = torch.ones(64)


def twice(saved: Saved) -> None:
    saved["model"]["_orig_mod.cls_embedding"] = torch.zeros(16)


def other_trunk(folder: Path) -> tuple[str | Path, ...]:
    run(write(folder / "first.pt", saved_by_train_py()), folder / "trunk")
    return (write(folder / "ckpt.pt", saved_by_train_py(seed=1)), "--out", folder / "trunk")


def trunk_without_cls(folder: Path) -> tuple[str | Path, ...]:
    """A first stage that has no [CLS] yet; the second one's data set added it."""
    config = dataclasses.replace(TINY, vocab_size=TINY.vocab_size - 1, cls_token_id=None)
    run(write(folder / "first.pt", saved_by_train_py(config)), folder / "trunk")
    return (write(folder / "ckpt.pt", saved_by_train_py()), "--out", folder / "trunk")


def trunk_of_other_texts(folder: Path) -> tuple[str | Path, ...]:
    case = other_trunk(folder)
    saved = saved_by_train_py()
    meta = saved["config"]["meta"]
    meta["stoi"]["é"] = meta["stoi"].pop("a")
    meta["itos"] = None
    write(folder / "ckpt.pt", saved)
    return case


def broken_trunk(folder: Path) -> tuple[str | Path, ...]:
    (folder / "trunk").mkdir()
    (folder / "trunk" / "config.json").write_text("{}")
    return (write(folder / "ckpt.pt", saved_by_train_py()), "--out", folder / "trunk")


def folder_in_the_way(folder: Path) -> tuple[str | Path, ...]:
    case = (write(folder / "ckpt.pt", saved_by_train_py()), "--out", folder / "trunk")
    run(case[0], folder / "trunk", "--name", "other")
    (folder / "trunk" / "adapters" / "ckpt.safetensors" / "x").mkdir(parents=True)
    return case


REFUSALS: dict[str, tuple[Case, str]] = {
    # the file
    "no file": (file(lambda path: None), r"ckpt\.pt does not exist"),
    "a folder": (file(Path.mkdir), r"ckpt\.pt is a folder"),
    "an empty file": (file(Path.touch), "not a checkpoint of torch.save"),
    "a text": (file(lambda p: p.write_text("x" * 99)), "not a checkpoint of torch.save"),
    "a meta.pkl": (
        file(lambda p: p.write_bytes(pickle.dumps(meta_of(TINY), protocol=4))),
        "not a checkpoint of torch.save",
    ),
    "cut off": (
        file(lambda p: p.write_bytes(write(p, saved_by_train_py()).read_bytes()[:5000])),
        "damaged or cut off",
    ),
    "a safetensors file": (
        file(lambda p: save_file({"a": torch.ones(1)}, p)),
        "a safetensors file.*trunkline adapters push",
    ),
    "a global": (
        checkpoint(lambda s: s | {"x": Custom()}),
        r"asks for [\w.]*Custom.*save it again",
    ),
    "a list": (file(lambda p: write(p, [1])), "holds a list"),
    "a bare state dict": (checkpoint(lambda s: s["model"]), "without model_args"),
    "no model_args": (checkpoint(lambda s: {"model": s["model"]}), "model_args missing"),
    "a model that is no dict": (checkpoint(lambda s: s | {"model": [1]}), "must be a dict"),
    "a text among the tensors": (tensors(cls_embedding="x"), "cls_embedding .* is not a tensor"),
    "a tensor twice": (checkpoint(twice), "two tensors are named cls_embedding"),
    # the tensors
    "LoRA alone": (checkpoint(only_lora), "no tensors of a trunk.*adapters push"),
    "no LoRA": (checkpoint(lose_lora), "no LoRA tensors.*--trunk-only"),
    "LoRA without effect": (checkpoint(zero_b), "changes nothing.*every B zero.*--trunk-only"),
    "a missing matrix": (
        tensors(transformer__h__1__ln_2__bias=None),
        r"no transformer\.h\.1\.ln_2",
    ),
    "half of a LoRA": (
        tensors(transformer__h__1__attn__lora_qkv__B__weight=None),
        rf"{LORA}\.B\.weight is missing",
    ),
    "a wrong shape": (
        tensors(transformer__ln_f__weight=torch.ones(17)),
        r"ln_f\.weight has shape \[17\], not \[16\]",
    ),
    "LoRA of a wrong shape": (
        tensors(transformer__h__1__attn__lora_qkv__B__weight=torch.ones(47, 4)),
        rf"{LORA}\.B\.weight must be \(48, rank\)",
    ),
    "NaN in the trunk": (
        tensors(transformer__ln_f__weight=torch.full((16,), torch.nan)),
        r"ln_f\.weight has values that are not finite.*earlier checkpoint",
    ),
    "NaN in the LoRA": (
        tensors(transformer__h__1__attn__lora_qkv__B__weight=torch.full((48, 4), torch.inf)),
        rf"{LORA}\.B\.weight has values that are not finite",
    ),
    "weights too large": (
        tensors(transformer__ln_f__weight=torch.full((16,), 3e38)),
        "a forward pass of the trunk .* not finite",
    ),
    "float64": (
        tensors(transformer__ln_f__weight=torch.ones(16).double()),
        r"float64.*\.float\(\)",
    ),
    "integers": (tensors(transformer__ln_f__weight=torch.ones(16).int()), "ln_f.weight is int32"),
    "learned positions": (
        checkpoint(lambda s: s["model"].update({"transformer.wpe.weight": torch.ones(64, 16)})),
        r"wpe\.weight has no place in this model.*rotary",
    ),
    "an untied head": (tensors(lm_head__weight=torch.ones(TINY.vocab_size, 16)), "not tied"),
    "layers that differ": (checkpoint(uneven), r"c_fc\.bias of layer 1 differs from layer 0"),
    "a critic that is missing": (tensors(critic_head__weight=None), "add_critic_head is set"),
    # model_args
    "guidance": (args(use_guidance=True), "use_guidance True.*plan encoder"),
    "an unknown key": (args(film_rank=4), "'film_rank'.*--ignore-key film_rank"),
    "causal attention": (args(attention_type="causal"), "attention_type causal"),
    "absolute positions": (args(use_rope=False), "use_rope False"),
    "heads that do not divide": (args(n_head=3), "n_head 3"),
    "a value of a wrong type": (args(n_layer="2"), "n_layer must be of type int"),
    "more layers than there are": (args(n_layer=3), r"no transformer\.h\.2\.attn\.c_attn"),
    "a billion layers": (args(n_layer=10**9), "n_layer must be at most 4096"),
    "four thousand layers": (args(n_layer=4000), "n_layer 4000, and there are"),
    "a trillion positions": (args(block_size=10**12), "block_size must be at most"),
    "fewer layers than there are": (args(n_layer=1), r"h\.1\.\S+ has no place"),
    "a key to ignore that is not there": (sound("--ignore-key", "x"), "--ignore-key x"),
    # the vocabulary
    "no meta": (
        checkpoint(without_own_meta),
        "does not carry its data set's vocabulary, and none is beside it.*--meta",
    ),
    "no meta file": (sound("--meta", "{}/none.pkl"), r"none\.pkl does not exist"),
    "a meta that is no pickle": (sound("--meta", "{}/file"), "file is not a pickle file"),
    "a meta with a global": (meta(lambda m: m | {"x": Custom()}), r"asks for [\w.]*Custom"),
    "a meta without stoi": (meta(lambda m: m.pop("stoi") and None), "no vocabulary stoi"),
    "a hole in stoi": (meta(lambda m: m["stoi"].update({"a": 99})), "without a gap"),
    "a vocabulary of words": (
        meta(lambda m: {"stoi": {"the": 0} | {c: i + 1 for i, c in enumerate(CHARACTERS)}}),
        "disagree about mask_token_id",
    ),
    "itos of another vocabulary": (meta(lambda m: m["itos"].update({0: "x"})), "itos .* disagree"),
    "a larger vocabulary": (
        meta(lambda m: m | {"stoi": m["stoi"] | {"é": TINY.vocab_size}, "itos": None}),
        "more than the model's vocab_size",
    ),
    "a vocabulary of another size": (
        meta(lambda m: m | {"vocab_size": 9}),
        "vocab_size 9, and its stoi",
    ),
    "a smaller model": (args(vocab_size=60, cls_token_id=None), "outside the vocabulary of 60"),
    "another mask": (meta(lambda m: m | {"mask_token_id": 3}), "disagree about mask_token_id"),
    # where it goes
    "a name that can't be one": (sound("--name", "../a"), "an adapter name is 1 to 64"),
    "out is a file": (sound("--out", "{}/file"), "file is a file, and a trunk is a folder"),
    "out is below a file": (sound("--out", "{}/file/trunk"), "file is a file, and a trunk is"),
    "out takes no writes": (sound("--out", "/proc/trunk"), "/proc/"),
    "out has another trunk": (other_trunk, "another trunk.*LoRA together.*another --out"),
    "out has a trunk without [CLS]": (trunk_without_cls, r"it has \[CLS\].*another --out"),
    "out has another vocabulary": (
        trunk_of_other_texts,
        "1 of its entries are not the trunk's, 1 of the trunk's not its.*another --out",
    ),
    "out has a broken trunk": (broken_trunk, r"trunk"),
    "a folder has the file's name": (folder_in_the_way, r"ckpt\.safetensors"),
    # calibration
    "no calibration file": (sound("--calibration", "{}/none"), "none can't be read"),
    "a calibration that is no JSON": (sound("--calibration", "{}/broken.json"), "is not JSON"),
    "a calibration that is a list": (sound("--calibration", "{}/list.json"), "holds a list"),
    "99 numbers": (sound("--calibration", "{}/short.json"), "not a list of 100 numbers"),
    "numbers beyond a float's": (sound("--calibration", "{}/huge.json"), "not a list of 100"),
    "numbers that are not finite": (sound("--calibration", "{}/infinite.json"), "not a list of"),
    "no entry that fits": (sound("--calibration", "{}/none.json"), "has no entry for ckpt.pt"),
    # what serving would refuse
    "a rank over the maximum": (sound("--max-rank", "3"), r"rank 4 is outside 1\.\.3"),
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_can_t_be_imported_is_refused_in_one_sentence_and_nothing_is_written(
    tmp_path: Path, kind: str
) -> None:
    case, sentence = REFUSALS[kind]
    arguments = [str(argument) for argument in case(tmp_path)]
    before = files(tmp_path)
    done = CliRunner().invoke(main, ["import", *arguments])
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.output.startswith("Error: ")
    assert done.output.count("\n") == 1, done.output
    assert len(done.output) < 1000
    assert re.search(sentence, done.output), done.output
    assert files(tmp_path) == before
