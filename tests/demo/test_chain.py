"""The whole chain on a tiny trunk: train, push, serve, evaluate; and the tour's server."""

import io
import json
import random
from pathlib import Path

import httpx
import pytest
import torch
from cli_shell import Shell
from click.testing import CliRunner, Result
from conftest import Serve, Served
from rich.console import Console
from safetensors.torch import save_file

from model.checkpoint import read_backbone
from model.demo import tasks
from model.demo.tour import SAMPLES, Tour, missing_sets
from server.cli import main

SHAPE = ["--n-layer=2", "--n-head=2", "--n-embd=32", "--block-size=512", "--vocab-size=330"]
QUICK = ["--threads=1", "--batch-tokens=512", "--learning-rate=1e-2"]
ANIMALS, TOOLS = ("cat", "dog", "hen", "cow", "pig"), ("saw", "axe", "pen", "jug", "mop")
OBJECTIVES = {
    "supersense": ["--objective=classify"],
    "era": ["--objective=classify"],
    "verses": ["--objective=pairs", "--fields=kjv,web"],
    "translators": ["--objective=tokens", "--fields=kjv,added", "--epochs=12"],
    "scripture": ["--objective=masked", "--epochs=24"],
}


def train(*arguments: str | Path) -> Result:
    before = torch.get_num_threads()
    result = CliRunner().invoke(main, ["train", *map(str, arguments)])
    torch.set_num_threads(before)
    return result


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def row(dice: random.Random) -> dict[str, dict]:
    """One row of each task: animals eat, tools lie; the added words are `in it`."""
    is_animal = dice.random() < 0.5
    noun, where = (
        dice.choice(ANIMALS if is_animal else TOOLS),
        dice.choice(("barn", "box", "house")),
    )
    deed = "eats its food" if is_animal else "lies quite still"
    text = f"The {noun} {deed} in the {where}."
    labelled = {"text": text, "label": "animal" if is_animal else "tool"}
    added = f"The {noun} in it {deed} by the {where}."
    span = [added.index("in it"), added.index("in it") + len("in it")]
    return {
        "supersense": labelled,
        "era": labelled,
        "verses": {"kjv": text, "web": f"In the {where} a {noun} {deed}."},
        "translators": {"kjv": added, "added": [span]},
        "scripture": {"text": text},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, dice = tmp_path_factory.mktemp("tasks"), random.Random(0)
    for part, count in (("train", 120), ("test", 40)):
        rows = [row(dice) for _ in range(count)]
        for task in OBJECTIVES:
            write(folder / f"{task}_{part}.jsonl", [r[task] for r in rows])
    write(folder / "verses_hard_test.jsonl", [r["verses"] for r in rows])
    lines = [row(dice)["scripture"]["text"] for _ in range(200)]
    (folder / "corpus.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def trunk(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trunk") / "tiny"
    save_file({"rows": teacher_of(data)}, out.with_name("teacher.safetensors"))
    teacher = ["--teacher", out.with_name("teacher.safetensors")]
    result = train(
        "trunk", data / "corpus.txt", "--out", out, *SHAPE, *QUICK, "--epochs=8", *teacher
    )
    assert result.exit_code == 0, result.output
    return out


def teacher_of(data: Path) -> torch.Tensor:
    """One direction for animals, its opposite for tools."""
    torch.manual_seed(0)
    lines = (data / "corpus.txt").read_text("utf-8").splitlines()
    signs = torch.tensor([1.0 if "eats" in line else -1.0 for line in lines])
    return signs.unsqueeze(1) * torch.nn.functional.normalize(torch.randn(32), dim=0)


def test_trunk_comes_near_its_teacher(trunk: Path) -> None:
    log = (trunk.with_name("tiny.run") / "log.jsonl").read_text("utf-8").splitlines()
    distances = [json.loads(line)["parts"]["teacher"] for line in log]
    assert distances[0] > 0.7
    assert distances[-1] < 0.3


def test_trunk_goes_on_from_a_base(trunk: Path, data: Path, tmp_path: Path) -> None:
    more = train(
        "trunk", data / "corpus.txt", "--out", tmp_path / "on", "--base", trunk, *SHAPE, *QUICK,
        "--epochs=0.1", "--learning-rate=1e-9",
    )  # fmt: skip
    assert more.exit_code == 0, more.output
    before, after = read_backbone(trunk), read_backbone(tmp_path / "on")
    for name, tensor in before.tensors.items():
        torch.testing.assert_close(after.tensors[name], tensor)
    text = "The cat eats its food."
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"wte": torch.zeros(330, 32)}, "'rows' is missing"),
        ({"rows": torch.zeros(199, 32)}, "rows [199, 32] where (200, 32) was expected"),
        ({"rows": torch.full((200, 32), torch.nan)}, "rows [200, 32] where"),
        (None, "not a teacher's vectors"),
    ],
)
def test_teacher_of_another_corpus_is_one_sentence(
    tensors: dict[str, torch.Tensor] | None, sentence: str, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "teacher.safetensors"
    if tensors is None:
        path.write_bytes(b"no tensors")
    else:
        save_file(tensors, path)
    result = train(
        "trunk", data / "corpus.txt", "--out", tmp_path / "t", *SHAPE, *QUICK, "--teacher", path
    )
    assert result.exit_code == 1
    assert sentence in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "t").exists()


def test_chain_trains_pushes_serves_and_evaluates(
    trunk: Path, data: Path, serve: Serve, tmp_path: Path
) -> None:
    reason = "the baselines need the extra `demo`"
    pytest.importorskip("sklearn", reason=reason)
    evaluate = pytest.importorskip("model.demo.evaluate", reason=reason).main
    server = serve(trunk)
    for task, options in OBJECTIVES.items():
        out = tmp_path / f"{task}.safetensors"
        result = train(
            "adapter", trunk, data / f"{task}_train.jsonl", "--out", out, *options, *QUICK
        )
        assert result.exit_code == 0, result.output
        Shell(server.url).shown("push", out, task)
    result = CliRunner().invoke(
        evaluate,
        [str(data), "--url", server.url, "--out", str(tmp_path), "--held-out=0.1"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))
    values = {(f["task"], f["of"], f["measure"]): f["value"] for f in figures}
    assert values["supersense", "adapter", "accuracy"] == 1.0
    precision = "average precision"
    bare = values["translators", "bare trunk", precision]
    assert values["translators", "adapter", precision] > bare + 0.2
    assert values["scripture", "adapter", "masked accuracy"] > 0.1  # chance is 0.003
    assert {task for task, _, _ in values} == {*OBJECTIVES, "verses without names", "critic"}
    assert all(f["low"] <= f["value"] <= f["high"] for f in figures if f["task"] != "critic")
    table = (tmp_path / "evaluation.md").read_text("utf-8").splitlines()
    assert len(table) == len(figures) + 2
    with server.client() as client:
        assert missing_sets(client) == []
        shown = toured(client)
    assert "truly added" in shown
    assert all(f"{adapter} " in shown for adapter in ("verses", "base", "scripture", "supersense"))
    assert shown.count("✓") + shown.count("✗") == 2 * 2 + 8 + 4  # verses, definitions, passages


def toured(client: httpx.Client) -> str:
    """What the tour prints, of the rows that are shipped for it."""
    samples = [json.loads(line) for line in SAMPLES.read_text("utf-8").splitlines()]
    console = Console(record=True, width=200, file=io.StringIO())
    Tour(client, console, samples).walk()
    return console.export_text()


def test_tour_of_a_trunk_without_the_sets_is_one_sentence(kit_server: Served) -> None:
    with kit_server.client() as client:
        assert missing_sets(client) == ["era", "scripture", "supersense", "translators", "verses"]


def test_names_go_from_both_sides() -> None:
    verse = {"kjv": "And Job answered, and Job said", "web": "Then Job answered and said"}
    assert tasks.names_of([verse]) == {"Job"}
    bare = tasks.without_names(verse, {"Job"})
    assert bare == {"kjv": "And answered, and said", "web": "Then answered and said"}


def test_pieces_end_at_sentences_and_lose_nothing() -> None:
    document = " ".join(f"This is sentence {n} of a long document." for n in range(100))
    found = list(tasks.pieces(document))
    assert " ".join(found) == document
    assert all(len(piece) <= tasks.PIECE and piece.endswith(".") for piece in found)
