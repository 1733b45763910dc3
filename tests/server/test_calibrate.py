"""trunkline calibrate: a table fitted by the training code's method, written, checked, served."""

import json
import lzma
import math
import random
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import CHARACTERS, TINY, Served
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Oracle

from adapters.format import read_adapter, write_adapter
from adapters.validate import validate
from model.calibration import bucket_table
from model.checkpoint import read_backbone, write_backbone
from model.corpus import sample_rows
from model.metrics import expected_calibration_error
from server.cli import main


def owners_fill(shares: list[float | None]) -> list[float]:
    """The rule in the words of the training code: from the centre's side, else from the other."""
    whole = []
    for bucket in range(100):
        inward = range(bucket + 1, 100) if bucket < 50 else range(bucket - 1, -1, -1)
        outward = range(bucket - 1, -1, -1) if bucket < 50 else range(bucket + 1, 100)
        order = [bucket, *inward, *outward]
        whole.append(next(shares[b] for b in order if shares[b] is not None))
    return whole


@given(
    st.dictionaries(st.integers(0, 99), st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1)
)
@settings(max_examples=100, deadline=None)
def test_the_table_is_the_share_of_wrong_tokens_by_bucket_and_empty_ones_take_the_inner_neighbour_s(
    buckets: dict[int, tuple[int, int]],
) -> None:
    p, wrong, shares = [], [], [None] * 100
    for bucket, (tokens, most) in buckets.items():
        hits = min(most, tokens)
        p += [bucket / 100 + 0.005] * tokens
        wrong += [True] * hits + [False] * (tokens - hits)
        shares[bucket] = hits / tokens
    table, filled = bucket_table(torch.tensor(wrong), torch.tensor(p))
    assert filled == len(buckets)
    assert table.tolist() == pytest.approx(owners_fill(shares))


def test_an_over_confident_critic_is_corrected_and_no_token_falls_out_of_the_table() -> None:
    torch.manual_seed(0)
    p = torch.cat((torch.rand(40_000), torch.tensor([0.0, 1.0])))
    wrong = torch.rand(len(p)) < p**3
    table, filled = bucket_table(wrong[::2], p[::2])
    other = p[1::2]
    mapped = table[(other * 100).long().clamp(max=99)]
    assert filled == 100
    assert expected_calibration_error(wrong[1::2], other) > 0.1
    assert expected_calibration_error(wrong[1::2], mapped) < 0.02


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dice = random.Random(0)
    rows = ["".join(dice.choices(CHARACTERS[1:], k=dice.randint(5, 80))) for _ in range(120)]
    path = tmp_path_factory.mktemp("text") / "held-out.jsonl.xz"
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    path.write_bytes(lzma.compress(lines.encode()))
    return path


def calibrate(*arguments: str | Path) -> Result:
    command = ["calibrate", *map(str, arguments), "--threads", "1", "--dtype", "float32"]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def errors_of(result: Result) -> dict[str, float]:
    assert result.exit_code == 0, result.output
    found = re.findall(r"^  (\D+?) +([0-9.]+)$", result.stdout, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_the_written_adapter_is_the_same_set_with_a_table_and_the_server_answers_by_it(
    tiny_backbone: Path, tiny_server: Served, tiny: Oracle, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "sharp.safetensors"
    own = tiny.sets["full"]
    loud = own.tensors | {"critic_head.weight": own.tensors["critic_head.weight"] * 3}
    write_adapter(file, loud, lora_alpha=8.0, base_digest=None, metadata=own.metadata)
    before = read_adapter(file)
    result = calibrate(tiny_backbone, file, text)
    errors = errors_of(result)
    assert list(errors) == ["critic alone", "new table"]
    assert errors["critic alone"] > 0.2
    assert errors["new table"] < 0.25 * errors["critic alone"]
    after, backbone = read_adapter(file), read_backbone(tiny_backbone)
    assert after.metadata == before.metadata
    assert after.tensors.keys() == before.tensors.keys() | {"calibration"}
    assert all(torch.equal(after.tensors[n], t) for n, t in before.tensors.items())
    assert f"{after.digest} (was {before.digest})" in result.stdout
    assert validate(after, TINY, backbone.digest, torch.bfloat16).calibration
    table = after.tensors["calibration"].tolist()
    headers = {"content-type": "application/octet-stream"}
    with tiny_server.client() as client:
        answer = client.put("/adapters/sharp", content=file.read_bytes(), headers=headers)
        assert answer.status_code == 201, answer.text
        body = {"adapter": "sharp", "inputs": "To be, or not to be"}
        (row,) = client.post("/critic", json=body).json()["data"]
        assert client.delete("/adapters/sharp").status_code == 200
    for token in row["tokens"]:
        bucket = min(math.floor(100 / (1 + math.exp(-token["logit"]))), 99)
        assert token["wrongness"] == pytest.approx(table[bucket], abs=1e-6)
    # Again: what was there counts as before, the seed alone decides the table, and a table that is
    # no better is written only where --out asks for it.
    again = calibrate(tiny_backbone, file, text)
    assert again.exit_code == 1
    assert f"no better than what was there, so {file} stays as it is" in again.output
    assert read_adapter(file).digest == after.digest
    asked = calibrate(tiny_backbone, file, text, "--out", tmp_path / "again.safetensors")
    assert errors_of(asked)["table before"] == errors["new table"]
    assert read_adapter(tmp_path / "again.safetensors").digest == after.digest


def test_out_and_json_and_a_dry_run_leave_the_adapter_alone(
    tiny_backbone: Path, text: Path, tmp_path: Path
) -> None:
    """An adapter by its name in the trunk's folder; the json form keeps its other entries."""
    file = tiny_backbone / "adapters" / "full.safetensors"
    before = file.read_bytes()
    entries = tmp_path / "calibration.json"
    entries.write_text('{"out/other.pt": [1]}')
    arguments = ("--json", entries, "--out", tmp_path / "new.safetensors", "--rows", "50")
    result = calibrate(tiny_backbone, "full", text, *arguments)
    assert " of 25 other rows" in result.stdout
    table = read_adapter(tmp_path / "new.safetensors").tensors["calibration"]
    written = json.loads(entries.read_text())
    assert written == {"out/other.pt": [1], "full": pytest.approx(table.tolist())}
    errors_of(calibrate(tiny_backbone, "full", text, "--dry-run", "--rows", "50"))
    assert file.read_bytes() == before


def test_base_calibrates_the_trunk_itself(tiny_backbone: Path, text: Path, tmp_path: Path) -> None:
    own, trunk = read_backbone(tiny_backbone), tmp_path / "trunk"
    write_backbone(trunk, own.config, own.tensors, own.tokenizer)
    errors_of(calibrate(trunk, "base", text, "--rows", "60"))
    calibrated = read_backbone(trunk)
    assert calibrated.calibration is not None
    assert calibrated.digest == own.digest


@pytest.mark.parametrize(
    ("adapter", "rows", "sentence"),
    [
        ("nobody", ["abc", "def"], "nobody is neither an adapter file nor one of "),
        ("full", ["abc"], "one row alone leaves nothing to measure on"),
        ("full", [], "the file is empty"),
        ("full", ["abc", "naïve"], "text.txt, line 2: 'text': "),
        ("text.txt", ["abc", "def"], "text.txt: "),
    ],
)
def test_what_can_t_be_calibrated_is_one_sentence_and_nothing_is_written(
    adapter: str, rows: list[str], sentence: str, tiny_backbone: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{row}\n" for row in rows), "utf-8")
    name = str(path) if adapter == "text.txt" else adapter
    result = calibrate(tiny_backbone, name, path, "--out", tmp_path / "new.safetensors")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "new.safetensors").exists()


def test_rows_of_special_tokens_have_nothing_to_mask_and_pad_does_not_count(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    path = tmp_path / "special.txt"
    path.write_text("[CLS][PAD][PAD]\n" * 6)
    result = calibrate(tiny_backbone, "full", path, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "fitted on 3 tokens of 3 rows, 0.0% of them wrong" in result.stdout


def test_a_folder_that_can_t_be_written_is_one_sentence(
    tiny_backbone: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "file" / "new.safetensors"
    result = calibrate(tiny_backbone, "full", text, "--rows", "10", "--out", out)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {tmp_path / 'file'}")


def test_without_a_critic_head_there_is_nothing_to_calibrate(
    bare_backbone: Path, text: Path
) -> None:
    result = calibrate(bare_backbone, "plain", text)
    assert "neither the trunk nor the adapter has a critic head" in result.stderr
    assert "table before" in errors_of(calibrate(bare_backbone, "judge", text, "--dry-run"))


def test_rows_are_drawn_from_the_whole_file_and_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"{number}\n" for number in range(1000)))
    drawn = [[row.line for row in sample_rows(path, "text", 100, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 100
    assert max(drawn[0]) > 900
    assert len(sample_rows(path, "text", 5000, 0)) == 1000
