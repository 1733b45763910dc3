"""Training: the chain on a tiny trunk, a run killed and gone on with, and bad data."""

import dataclasses
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import TINY, random_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import served

from adapters.format import AdapterSet, read_adapter
from adapters.validate import validate
from model.batches import Batch, Batches, Example
from model.checkpoint import Backbone, read_backbone, write_backbone
from model.encoder import FINAL, Encoder
from model.gpt import GPT
from model.heads import critic_logits, label_scores, pool, sequence_scores
from model.lora import LoraBatch
from model.masked import Masked
from model.metrics import (
    area_under_roc,
    average_precision,
    calibration_table,
    expected_calibration_error,
    macro_f1,
    retrieval,
)
from model.packed import PackedBatch
from model.train import learning_rate
from model.vocabulary import learn_vocabulary
from server.cli import main
from server.cli.training import load_weights

SHAPE = [
    "--n-layer=2",
    "--n-head=2",
    "--n-embd=32",
    "--block-size=48",
    "--vocab-size=330",
    "--held-out=0.1",
]
QUICK = ["--threads=1", "--batch-tokens=256", "--learning-rate=1e-2", "--checkpoint-every=20"]
ADAMW, MUON = ("--epochs=20",), ("--epochs=6", "--muon")
ANIMALS, TOOLS = ("cat", "dog", "hen", "cow", "pig"), ("saw", "axe", "pen", "jug", "mop")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label): animals eat, tools lie somewhere."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        where = dice.choice(("the barn", "a big box", "the old house"))
        if dice.random() < 0.5:
            rows.append((f"The {dice.choice(ANIMALS)} eats its food in {where}.", "animal"))
        else:
            rows.append((f"A {dice.choice(TOOLS)} lies upon the floor of {where}.", "tool"))
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def trunkline(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)], catch_exceptions=False)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt.xz"
    text = "".join(f"{text}\n" for text, _ in sentences(500))
    path.write_bytes(lzma.compress(text.encode()))
    return path


@pytest.fixture(scope="module")
def trunk(corpus: Path) -> Path:
    """A tiny trunk, trained without a break."""
    out = corpus.parent / "trunk"
    result = trunkline("trunk", corpus, "--out", out, *SHAPE, *QUICK, *ADAMW)
    assert result.exit_code == 0, result.output
    return out


def train_adapter(trunk: Path, data: Path, out: Path, *arguments: str | Path) -> AdapterSet:
    """The adapter file, valid on its trunk."""
    result = trunkline("adapter", trunk, data, "--out", out, *QUICK, *arguments)
    assert result.exit_code == 0, result.output
    backbone, adapter = read_backbone(trunk), read_adapter(out)
    validate(adapter, backbone.config, backbone.digest, torch.bfloat16)
    return dataclasses.replace(adapter, tensors={n: t.float() for n, t in adapter.tensors.items()})


def serve_state(
    backbone: Backbone, adapter: AdapterSet, text: str
) -> tuple[torch.Tensor, PackedBatch]:
    """The text's (T, C) state as it is served under the adapter."""
    ids = backbone.tokenizer.encode(text).ids
    batch = PackedBatch(torch.tensor(ids), [len(ids)])
    weights = served(adapter, backbone.config, torch.float32)
    encoder = Encoder(backbone.config, backbone.tensors)
    lora = LoraBatch.of_rows(batch.lengths, [weights])
    return encoder.forward(batch, lora)[FINAL], batch


def test_trunk_training_lowers_the_loss_and_leaves_a_backbone(trunk: Path) -> None:
    curve = losses(trunk.with_name("trunk.run"))
    parts = json.loads((trunk.with_name("trunk.run") / "log.jsonl").read_text().splitlines()[-1])
    assert parts["parts"]["masked"] < 0.6 * curve[0]
    backbone = read_backbone(trunk)
    assert backbone.calibration is not None
    assert {t.dtype for t in backbone.tensors.values()} == {torch.float16}
    metrics = json.loads((trunk.with_name("trunk.run") / "metrics.json").read_text())
    assert metrics["critic_auc"] > 0.5
    assert metrics["masked_accuracy"] > 0.3


@pytest.fixture(scope="module")
def muon_trunk(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with Muon, without a break either."""
    out = tmp_path_factory.mktemp("muon") / "trunk"
    result = trunkline("trunk", corpus, "--out", out, *SHAPE, *QUICK, *MUON)
    assert result.exit_code == 0, result.output
    return out


def test_muon_lowers_the_loss_too_and_steps_otherwise(trunk: Path, muon_trunk: Path) -> None:
    curve, other = (losses(folder.with_name("trunk.run")) for folder in (muon_trunk, trunk))
    assert min(curve) < 0.8 * curve[0]
    assert curve[0] == other[0]  # the same weights and rows, and another first step
    assert curve[1] != other[1]


@pytest.mark.parametrize(("whole", "options"), [("trunk", ADAMW), ("muon_trunk", MUON)])
def test_killed_run_goes_on_to_the_same_loss_and_the_same_trunk(
    whole: str, options: Sequence[str], corpus: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    trunk: Path = request.getfixturevalue(whole)
    out, run = tmp_path / "trunk", tmp_path / "trunk.run"
    arguments = ["trunk", corpus, "--out", out, *SHAPE, *QUICK, *options]
    command = [sys.executable, "-m", "server.cli", "train", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    done = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert done < len(losses(trunk.with_name("trunk.run")))
    result = trunkline(*arguments)
    assert result.exit_code == 0, result.output
    assert losses(run) == losses(trunk.with_name("trunk.run"))
    assert read_backbone(out).digest == read_backbone(trunk).digest


@pytest.mark.parametrize("epochs", [1, 0.5])
def test_finished_run_says_so_and_writes_the_same_again(
    epochs: float, corpus: Path, tmp_path: Path
) -> None:
    out, run = tmp_path / "trunk", tmp_path / "trunk.run"
    arguments = ("trunk", corpus, "--out", out, *SHAPE, *QUICK)
    first = trunkline(*arguments, "--epochs", "1")
    assert "step " in first.stderr
    steps, digest = len(losses(run)), read_backbone(out).digest
    again = trunkline(*arguments, "--epochs", str(epochs))
    assert again.exit_code == 0
    sentence = f"{run} is finished, at step {steps}: nothing is trained. "
    assert again.stderr == f"{sentence}More --epochs go on from there, another --run begins anew.\n"
    assert again.stdout == first.stdout
    assert len(losses(run)) == steps
    assert read_backbone(out).digest == digest
    more = trunkline(*arguments, "--epochs", "2")
    assert f"step {len(losses(run))}/{len(losses(run))}" in more.stderr
    assert len(losses(run)) > steps


@pytest.mark.parametrize(
    ("flags", "native", "dtype"),
    [
        ((), {"avx512_bf16": True}, "bfloat16"),
        ((), {"amx_bf16": True}, "bfloat16"),
        ((), {"avx2": True}, "float32"),
        (("--dtype", "bfloat16"), {}, "bfloat16"),
        (("--dtype", "float32"), {"amx_bf16": True}, "float32"),
        (("--float32",), {"amx_bf16": True}, "float32"),
    ],
)
def test_training_s_dtype_is_chosen_as_serving_s_and_said(
    flags: Sequence[str],
    native: dict[str, bool],
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 only where the processor computes in it: elsewhere it is the slower one."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native)
    data = tmp_path / "few.txt"
    data.write_text("The cat eats its food.\n" * 4)
    arguments = ["trunk", data, "--out", tmp_path / "trunk", *SHAPE, *QUICK, "--epochs", "1"]
    result = trunkline(*arguments, *flags)
    assert result.exit_code == 0, result.output
    assert f" parameters on 3 examples in {dtype}, 1 thread\n" in result.stderr
    identity = torch.load(tmp_path / "trunk.run" / "checkpoint.pt", weights_only=True)["identity"]
    assert json.loads(identity)["bf16"] == (dtype == "bfloat16")


def test_two_flags_that_contradict_each_other_are_refused(corpus: Path, tmp_path: Path) -> None:
    flags = ["--float32", "--dtype", "bfloat16"]
    result = trunkline("trunk", corpus, "--out", tmp_path / "trunk", *SHAPE, *QUICK, *flags)
    assert result.exit_code == 2
    assert "contradict" in result.stderr


def test_run_folder_of_other_settings_is_refused(corpus: Path, trunk: Path, tmp_path: Path) -> None:
    run = trunk.with_name("trunk.run")
    other = [*QUICK, "--epochs", "20", "--seed", "7", "--run", run]
    result = trunkline("trunk", corpus, "--out", tmp_path / "other", *SHAPE, *other)
    assert result.exit_code == 1
    assert "was begun with seed 0, not 7" in result.output


def test_only_the_settings_that_differ_are_named(trunk: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text, _ in sentences(20)])
    train_adapter(trunk, data, tmp_path / "a.safetensors", "--objective", "masked", "--rank", "4")
    arguments = ["--out", tmp_path / "a.safetensors", "--objective", "masked", *QUICK]
    result = trunkline("adapter", trunk, data, *arguments, "--rank", "2")
    assert result.exit_code == 1
    sentence = "was begun with lora_rank 4, not 2: go on with the same, or choose another run"
    assert sentence in result.output


def test_a_trunk_without_pad_is_refused_in_a_sentence(trunk: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trunk, tmp_path / "trunk")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text, _ in sentences(20)])
    arguments = ["--out", tmp_path / "a.safetensors", "--objective", "masked", *QUICK]
    result = trunkline("adapter", folder, data, *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: the trunk has no pad_token_id, and training pads")


def test_classifier_labels_what_it_was_not_trained_on(trunk: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in sentences(400)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", rows[:50])
    arguments = ["--objective", "classify", "--test", test, "--epochs", "3"]
    adapter = train_adapter(trunk, data, tmp_path / "a.safetensors", *arguments)
    metrics = json.loads(adapter.metadata["metrics"])
    assert metrics["accuracy"] > 0.95
    assert adapter.labels == ("animal", "tool")
    backbone = read_backbone(trunk)
    weights = served(adapter, backbone.config, torch.float32)
    for text, label in sentences(20, seed=9):
        hidden, batch = serve_state(backbone, adapter, text)
        assert weights.classifier is not None
        scores = label_scores(pool(hidden, batch, [0], "mean"), weights.classifier)[0]
        assert adapter.labels[scores.argmax()] == label


def test_the_seed_alone_decides_the_adapter(trunk: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in sentences(60)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    digests = [
        train_adapter(
            *(trunk, data, tmp_path / f"{name}.safetensors"),
            *("--objective", "classify", "--epochs", "1", "--seed", seed),
        ).digest
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_pairs_bring_both_texts_together(trunk: Path, tmp_path: Path) -> None:
    places = ("the barn", "a big box", "the old house")
    pairs = [
        (f"The {noun} eats its food in {place}.", f"A {noun} lies upon {place}.")
        for noun in ANIMALS + TOOLS
        for place in places
    ]
    data = write_rows(tmp_path / "pairs.jsonl", [{"old": a, "new": b} for a, b in pairs])
    arguments = ["--objective", "pairs", "--fields", "old,new", "--test", data]
    arguments += ["--epochs", "60", "--batch-tokens", "2048"]
    adapter = train_adapter(trunk, data, tmp_path / "a.safetensors", *arguments)
    assert json.loads(adapter.metadata["metrics"])["recall@1"] > 0.25  # chance: 1/30


def test_token_labels_are_read_off_the_adapters_own_critic(trunk: Path, tmp_path: Path) -> None:
    rows = []
    for text, _ in sentences(300):
        start = text.index("in " if " in " in text else "of ")
        rows.append({"text": text, "spans": [[start, start + 2]]})
    data = write_rows(tmp_path / "spans.jsonl", rows)
    arguments = ["--objective", "tokens", "--test", data, "--epochs", "4"]
    adapter = train_adapter(trunk, data, tmp_path / "a.safetensors", *arguments)
    assert json.loads(adapter.metadata["metrics"])["average_precision"] > 0.9
    backbone, text = read_backbone(trunk), "The cat eats its food in the barn."
    hidden, _ = serve_state(backbone, adapter, text)
    scores = critic_logits(hidden, adapter.tensors["critic_head.weight"][0])
    start, end = backbone.tokenizer.encode(text).offsets[int(scores.argmax())]
    assert start < text.index("in the") + 2
    assert end > text.index("in the")


def test_masked_adapter_learns_its_domain(trunk: Path, tmp_path: Path) -> None:
    data = tmp_path / "domain.txt"
    data.write_text("Upon the old barn lies a big cat, its food the floor of a house.\n" * 200)
    test = tmp_path / "test.txt"
    test.write_text("Upon the old barn lies a big cat, its food the floor of a house.\n" * 5)
    arguments = ["--objective", "masked", "--test", test, "--epochs", "25"]
    adapter = train_adapter(trunk, data, tmp_path / "a.safetensors", *arguments)
    assert json.loads(adapter.metadata["metrics"])["masked_accuracy"] > 0.5
    assert "critic_head.weight" in adapter.tensors


@pytest.mark.parametrize("critic", [True, False])
def test_a_sequence_scorer_trained_on_a_frozen_trunk_is_in_the_adapter_and_served(
    critic: bool, trunk: Path, tmp_path: Path
) -> None:
    """Its head and CLS embedding, also over a trunk that has neither these nor a critic."""
    if not critic:
        own = read_backbone(trunk)
        tensors = {
            name: tensor
            for name, tensor in own.tensors.items()
            if not name.startswith(("critic", "sequence", "cls"))
        }
        trunk = tmp_path / "bare"
        config = dataclasses.replace(own.config, add_critic_head=False)
        write_backbone(trunk, config, tensors, own.tokenizer)
    data = tmp_path / "domain.txt"
    data.write_text("".join(f"{text}\n" for text, _ in sentences(60)))
    arguments = ["--objective", "masked", "--epochs", "10", "--critic-start", "0"]
    adapter = train_adapter(trunk, data, tmp_path / "a.safetensors", *arguments)
    backbone = read_backbone(trunk)
    weights = served(adapter, backbone.config, torch.float32)
    assert weights.sequence_head is not None
    assert ("critic_head.weight" in adapter.tensors) == critic
    before = backbone.tensors.get("cls_embedding", backbone.tensors["transformer.wte.weight"][2])
    assert not torch.equal(adapter.tensors["cls_embedding"], before.float())

    def score(text: str) -> float:
        hidden, _ = serve_state(backbone, adapter, f"[CLS]{text}")
        return sequence_scores(hidden[:1], weights.sequence_head).item()

    right, wrong = "The cat eats its food in the barn.", "cat food barn. its The in lies the eats"
    gpt = GPT(dataclasses.replace(backbone.config, add_critic_head=critic)).eval()
    load_weights(gpt, backbone)
    gpt.load_adapter_state_dict(adapter.tensors, adapter.lora_alpha)
    for text in (right, wrong):
        ids = torch.tensor([backbone.tokenizer.encode(f"[CLS]{text}").ids])
        assert score(text) == pytest.approx(gpt.sequence_scores(ids).item(), abs=1e-5)
    assert score(right) > score(wrong)


def test_a_scorer_of_given_scores_is_served_as_it_was_trained(trunk: Path, tmp_path: Path) -> None:
    """The second stage of a training: scores of texts on a frozen trunk."""
    rows = [{"text": t, "score": 0.9 if label == "animal" else 0} for t, label in sentences(300)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", rows[:40])
    arguments = ["--objective", "score", "--test", test, "--epochs", "3"]
    adapter = train_adapter(trunk, data, tmp_path / "a.safetensors", *arguments)
    metrics = json.loads(adapter.metadata["metrics"])
    assert metrics["mean_absolute_error"] < 0.1
    assert metrics["correlation"] > 0.9
    heads = {name.partition(".")[0] for name in adapter.tensors} - {"transformer"}
    assert heads == {"sequence_head", "cls_embedding"}
    backbone = read_backbone(trunk)
    weights = served(adapter, backbone.config, torch.float32)
    for text, label in sentences(10, seed=9):
        hidden, _ = serve_state(backbone, adapter, f"[CLS]{text}")
        score = sequence_scores(hidden[:1], weights.sequence_head).item()
        assert abs(score - (0.9 if label == "animal" else 0)) < 0.2


@pytest.mark.parametrize("score", [1.5, -0.1, "1", None, True])
def test_a_score_outside_0_to_1_is_one_sentence(score: object, trunk: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", [{"text": "a cat", "score": score}])
    arguments = ["--out", tmp_path / "a.safetensors", "--objective", "score"]
    result = trunkline("adapter", trunk, data, *arguments)
    assert result.exit_code == 1
    assert "line 1: 'score' must be a number from 0 to 1" in result.stderr


@pytest.mark.parametrize("objective", ["classify", "tokens"])
def test_heads_that_an_objective_does_not_train_stay_the_trunks(
    objective: str, trunk: Path, tmp_path: Path
) -> None:
    rows = [{"text": text, "label": label, "spans": [[0, 3]]} for text, label in sentences(30)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    arguments = ["--objective", objective, "--epochs", "1"]
    adapter = train_adapter(trunk, data, tmp_path / "a.safetensors", *arguments)
    heads = {name.partition(".")[0] for name in adapter.tensors} - {"transformer"}
    assert heads == ({"classifier"} if objective == "classify" else {"critic_head"})


def test_lora_of_a_trunk_trained_with_it_becomes_an_adapter(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "trunk"
    arguments = ["--out", out, *SHAPE, *QUICK, "--epochs", "1", "--lora-rank", "4"]
    assert trunkline("trunk", corpus, *arguments).exit_code == 0
    backbone, adapter = read_backbone(out), read_adapter(out / "adapters" / "trunk.safetensors")
    manifest = validate(adapter, backbone.config, backbone.digest, torch.bfloat16)
    assert manifest.rank == 4
    assert sorted(manifest.ranks) == [0, 1]


GOOD = {"text": "The cat eats its food.", "label": "animal"}
OTHER = {"text": "A saw lies upon the floor.", "label": "tool"}


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        ([], [], "train.jsonl: the file is empty"),
        ([GOOD, {"text": "no label"}], [], "line 2: the field 'label' is missing"),
        (
            [GOOD, {"text": "", "label": "tool"}],
            [],
            "line 2: 'text' must be a text that is not empt",
        ),
        ([GOOD, OTHER], [OTHER, {"text": "x", "label": "plant"}], "test.jsonl, line 2: the label "),
        ([GOOD, GOOD], [], "'label' is 'animal' in every row"),
        ([GOOD, OTHER | {"text": "cat " * 60}], [], "line 2: 'text' has "),
        ([GOOD, ["a list"]], [], "line 2: a row must be a JSON object"),
    ],
)
def test_bad_rows_are_one_sentence_and_no_file(
    train: list, test: list, sentence: str, trunk: Path, tmp_path: Path
) -> None:
    data, out = write_rows(tmp_path / "train.jsonl", train), tmp_path / "a.safetensors"
    arguments = ["--objective", "classify", *QUICK]
    if test:
        arguments += ["--test", str(write_rows(tmp_path / "test.jsonl", test))]
    result = trunkline("adapter", trunk, data, "--out", out, *arguments)
    assert result.exit_code == 1
    assert sentence in result.output
    assert result.output.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"train.jsonl", "test.jsonl"}


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"fine\n\xff\xfe\n", "line 2: not UTF-8"),
        (None, "No such file"),
        (b"a " * 200, "line 1: 'text' has "),
    ],
)
def test_bad_text_files_are_one_sentence(raw: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    if raw is not None:
        path.write_bytes(raw)
    result = trunkline("trunk", path, "--out", tmp_path / "trunk", *SHAPE, *QUICK)
    assert result.exit_code == 1
    assert sentence in result.output
    assert not (tmp_path / "trunk").exists()


def test_cut_archive_is_one_sentence(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.txt.xz"
    path.write_bytes(corpus.read_bytes()[:200])
    result = trunkline("trunk", path, "--out", tmp_path / "trunk", *SHAPE)
    assert result.exit_code == 1
    assert "cut short" in result.output


def test_losses_are_the_guides() -> None:
    gpt = random_gpt(TINY)
    objective = Masked(gpt).eval()
    torch.manual_seed(1)
    ids = torch.randint(0, 40, (3, 12))
    ids[1, 9:] = TINY.pad_token_id
    asked = objective._choose(ids)
    targets = torch.full_like(ids, TINY.ignore_index).flatten()
    targets[asked] = ids.flatten()[asked]
    masked = ids.flatten().index_fill(0, asked, TINY.mask_token_id).view_as(ids)
    _, logits = objective._predict(ids, asked)
    reference = torch.nn.functional.cross_entropy(
        gpt(masked)[0].flatten(0, 1), targets, ignore_index=TINY.ignore_index
    )
    ours = torch.nn.functional.cross_entropy(logits, ids.flatten()[asked])
    torch.testing.assert_close(ours, reference)
    sure = torch.full((ids.numel(), TINY.vocab_size), -1e4)  # one token each has all the chance
    sure[torch.arange(ids.numel()), torch.randint(0, 40, (ids.numel(),))] = 1e4
    filled = objective._fill(ids, asked, sure[asked])
    losses = objective._critic_losses(ids, filled)
    everywhere = sure.view(*ids.shape, -1)
    expected = gpt.critic_loss(masked, targets.view_as(ids), everywhere)
    torch.testing.assert_close(losses, {"critic": expected})


def test_every_example_is_in_an_epoch_once_and_little_is_padding() -> None:
    dice = random.Random(0)
    examples = [Example(([1] * dice.randint(1, 60),)) for _ in range(800)]
    batches = Batches(examples, 512, seed=3)
    first, second = batches.epoch(0), batches.epoch(1)
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(800))
    assert first != second
    assert first == Batches(examples, 512, seed=3).epoch(0)
    padded = sum(Batch.of([examples[i] for i in batch], TINY).ids.numel() for batch in first)
    assert sum(example.tokens for example in examples) > 0.9 * padded
    rest = list(batches.from_step(len(first) + 2, len(first) + 5, TINY))
    assert [batch.examples for batch in rest] == [
        [examples[i] for i in batch] for batch in second[2:5]
    ]


def test_learning_rate_climbs_to_its_peak_and_falls_to_a_twentieth() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(1, 101)]
    assert rates.index(max(rates)) == 9
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.05)
    assert rates[9:] == sorted(rates[9:], reverse=True)


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_learnt_vocabulary_writes_any_text_and_knows_where(text: str) -> None:
    tokens = VOCABULARY.encode(text)
    assert VOCABULARY.decode(tokens.ids) == text or "[" in text
    covered = {i for start, end in tokens.offsets for i in range(start, end)}
    assert covered == set(range(len(text)))


VOCABULARY = learn_vocabulary([text for text, _ in sentences(50)], 300)


def test_measures_equal_their_definitions() -> None:
    truth = torch.tensor([1, 0, 1, 0, 0, 1])
    score = torch.tensor([0.9, 0.8, 0.8, 0.3, 0.1, 0.2])
    above = [(p > n) + 0.5 * (p == n) for p in score[truth == 1] for n in score[truth == 0]]
    assert area_under_roc(truth, score) == pytest.approx(sum(map(float, above)) / 9)
    # thresholds .9 (1 of 1), .8 (2 of 3), .3, .2 (3 of 5), .1
    assert average_precision(truth, score) == pytest.approx(1 / 3 + 2 / 3 / 3 + 3 / 5 / 3)
    assert macro_f1(truth, torch.tensor([1, 0, 1, 0, 1, 0]), 3) == pytest.approx(2 / 3)
    eye = torch.eye(3)
    assert retrieval(eye, eye.roll(1, 0)) == pytest.approx({"recall@1": 0.0, "mrr": 0.4})


def test_calibration_table_rises_and_mends_an_overconfident_critic() -> None:
    torch.manual_seed(0)
    p = torch.rand(20000)
    wrong = torch.rand(20000) < p**3
    table = calibration_table(wrong, p)
    assert (table.diff() >= 0).all()
    calibrated = table[(p * 100).long().clamp(max=99)]
    assert expected_calibration_error(wrong, p) > 0.1
    assert expected_calibration_error(wrong, calibrated) < 0.02
