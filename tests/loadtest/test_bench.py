"""trunkline bench: every section runs, what it prints is whole, and wrong results are not timed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from loadtest.bench import oracle
from loadtest.bench.pairs import in_turn, speedups
from loadtest.bench.plan import Plan, Shape, Sizes
from loadtest.bench.report import Report
from loadtest.bench.run import SECTIONS, run
from loadtest.bench.trunk import Trunk, mixed_lengths
from server.cli.bench import bench

TINY = Shape(n_embd=32, n_layer=2, n_head=2, ranks=(8, 32))
SIZES = Sizes(
    rounds=1,
    slow_rounds=1,
    starts=1,
    round_s=0.001,
    window_s=0.05,
    swap_window_s=0.3,
    batch_tokens=1024,
    peer_tokens=1024,
    uniform=32,
    checked_rows=4,
    lone_requests=2,
    puts=1,
    registered=(10, 10_000),
    zipf=80,
    slots=64,
)
KEYS = {
    "forward_over_limit",
    "mixed_over_uniform",
    "over_one_at_a_time",
    "lone_http_over_forward",
    "front_end_over_starlette",
    "swap_p99_over_steady",
    "swap_errors",
    "zipf1000_over_resident",
    "bytes_over_file",
    "start_10000_over_10",
}
NESTED = {
    "adapters_over_base": {"k1_r8", "k8_r8", "k32_r8", "k32_r32"},
    "over_peft": {"uniform", "mixed"},
    "http_over_forward": {"binary", "base64", "json"},
}


def a_plan(scratch: Path) -> Plan:
    return Plan("tiny", TINY, "float32", torch.float32, 1, SIZES, scratch)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The last line of a bench of all sections, on a tiny trunk."""
    pytest.importorskip("peft")
    threads = torch.get_num_threads()
    report = run(a_plan(tmp_path_factory.mktemp("bench")), list(SECTIONS))
    torch.set_num_threads(threads)
    parsed: dict[str, object] = json.loads(report.line())
    return parsed


def test_the_last_line_has_every_key_and_its_spread(line: dict[str, object]) -> None:
    for key in KEYS:
        low, high = line[f"{key}_spread"]
        assert low <= high
        if key != "swap_errors":
            assert low <= line[key] <= high
            assert line[key] > 0
    for key, inner in NESTED.items():
        assert set(line[key]) == set(line[f"{key}_spread"]) == inner
        for name in inner:
            low, high = line[f"{key}_spread"][name]
            assert 0 < low <= line[key][name] <= high
    assert line["machine"]
    assert line["versions"]["torch"] == torch.__version__
    assert line["dtype"] == "float32"


def test_nothing_went_wrong_while_adapters_were_swapped(line: dict[str, object]) -> None:
    assert line["swap_errors"] == 0


def test_float32_adapters_take_their_files_bytes(line: dict[str, object]) -> None:
    assert 0.9 < line["bytes_over_file"] < 1.0  # the header is not resident


def test_wrong_states_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trunk.run

    def off_by_a_little(trunk: Trunk, rows) -> torch.Tensor:
        return original(trunk, rows) + 1e-2

    monkeypatch.setattr(Trunk, "run", off_by_a_little)
    for section in ("limit", "tax", "packing", "peers"):
        with pytest.raises(oracle.Mismatch, match="differs from the float32 oracle"):
            run(a_plan(tmp_path), [section])


def test_another_adapters_states_are_not_taken_for_an_adapters_own() -> None:
    trunk = Trunk(TINY.config(), torch.bfloat16)
    one, other = trunk.adapters(2, 8)
    rows = trunk.rows([32, 32], [one])
    reference = oracle.expected(trunk, rows, 2)
    oracle.check("right", trunk.run_rows(rows), reference, torch.bfloat16)
    wrong = replace(rows, adapters=[other, other])
    with pytest.raises(oracle.Mismatch, match="row 0"):
        oracle.check("wrong", trunk.run_rows(wrong), reference, torch.bfloat16)


def test_things_are_called_in_turn() -> None:
    calls: list[str] = []
    times = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, 1e-9)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert len(times["a"]) == len(times["b"]) == len(speedups(times, "a", "b")) == 3


@pytest.mark.parametrize("total", [4, 300, 515, 4096])
def test_mixed_lengths_add_up_and_keep_their_bounds(total: int) -> None:
    for seed in range(200):
        lengths = mixed_lengths(total, seed)
        assert sum(lengths) == total
        assert min(lengths) >= 4
        assert max(lengths) <= 512
    assert mixed_lengths(total, 0) == mixed_lengths(total, 0)


def test_a_report_has_medians_and_what_was_left_out() -> None:
    report = Report(dtype="float32")
    report.ratio("limit", "a", "outer.inner", [3.0, 1.0, 2.0])
    report.count("swap", "errors", "errors", [0, 2])
    report.left_out("peers", "no such package")
    line = json.loads(report.line())
    assert (line["outer"], line["outer_spread"]) == ({"inner": 2.0}, {"inner": [1.0, 3.0]})
    assert (line["errors"], line["errors_spread"]) == (2, [0, 2])
    assert line["left_out"] == {"peers": "no such package"}


def test_a_section_that_is_none_is_refused_by_name() -> None:
    result = CliRunner().invoke(bench, ["--sections", "limit,speed"])
    assert result.exit_code == 2
    assert "'speed'" in result.output
