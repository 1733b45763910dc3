"""limit: the forward beside the machine's own matrix rate.

The limit is what torch gets out of this machine for the trunk's four matrices: x (M, in) times
W (in, out), no bias, in the same dtype on the same threads, each matrix again and again, so that
it is in the cache. For each matrix the fastest way counts: the weights as nn.Linear has them,
transposed, or packed beforehand by oneDNN; M a whole batch or a part of it. The forward is counted
by its matrix arithmetic: 2 per weight and token, and 4 T^2 C a layer for a row's attention. All
else that it does is overhead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loadtest.bench.oracle import check_trunk
from loadtest.bench.pairs import in_turn, quotients, seconds
from loadtest.bench.plan import Plan
from loadtest.bench.report import Report
from loadtest.bench.trunk import Rows, Trunk
from model.config import MAIN_MATRICES, GPTConfig

PARTS = (1, 2, 4, 8)  # of a batch
TRIES = 15

Multiply = Callable[[], object]


@dataclass(frozen=True)
class Gemm:
    """One matrix on a batch, cut into parts."""

    matrix: str
    part: int  # tokens
    way: str
    run: Callable[[], None]


def linear_flops(config: GPTConfig, tokens: int) -> float:
    weights = sum(out * into for out, into in MAIN_MATRICES.values()) * config.n_embd**2
    return 2.0 * weights * config.n_layer * tokens


def attention_flops(config: GPTConfig, lengths: list[int]) -> float:
    return 4.0 * config.n_embd * config.n_layer * sum(length**2 for length in lengths)


def best_gemms(config: GPTConfig, dtype: torch.dtype, tokens: int) -> list[Gemm]:
    """For each of the four matrices the way that takes least time."""
    chosen = []
    for matrix, (out, into) in MAIN_MATRICES.items():
        candidates = [
            _gemm(matrix, part, tokens // part, way, multiply)
            for part in (tokens // parts for parts in PARTS if tokens % parts == 0)
            for way, multiply in _ways(into * config.n_embd, out * config.n_embd, part, dtype)
        ]
        for gemm in candidates:
            gemm.run()
        chosen.append(min(candidates, key=lambda g: min(seconds(g.run) for _ in range(TRIES))))
    return chosen


def _gemm(matrix: str, part: int, parts: int, way: str, multiply: Multiply) -> Gemm:
    def run() -> None:
        for _ in range(parts):
            multiply()

    return Gemm(matrix, part, way, run)


def _ways(into: int, out: int, part: int, dtype: torch.dtype) -> list[tuple[str, Multiply]]:
    weight, x = torch.randn(out, into).to(dtype), torch.randn(part, into).to(dtype)
    plain, transposed = weight.t(), weight.t().contiguous()
    y = torch.empty(part, out, dtype=dtype)
    ways: list[tuple[str, Multiply]] = [
        ("plain", lambda: torch.mm(x, plain, out=y)),
        ("transposed", lambda: torch.mm(x, transposed, out=y)),
    ]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, part)
        linear = torch.ops.mkldnn._linear_pointwise
        linear(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):  # a torch without oneDNN, or a dtype it does not pack
        return ways
    return [*ways, ("packed", lambda: linear(x, packed, None, "none", [], ""))]


def measure(plan: Plan, trunk: Trunk, report: Report) -> None:
    sizes = plan.sizes
    rows = trunk.rows([sizes.uniform] * (sizes.batch_tokens // sizes.uniform))
    check_trunk("limit", trunk, rows, sizes.checked_rows)
    gemms = best_gemms(trunk.config, plan.dtype, rows.tokens)

    def all_gemms() -> None:  # as many as the forward has
        for gemm in gemms:
            for _ in range(trunk.config.n_layer):
                gemm.run()

    times = in_turn(
        {"forward": lambda: trunk.run(rows), "limit": all_gemms}, sizes.rounds, sizes.round_s
    )
    _report(report, trunk.config, rows, gemms, times)


def _report(
    report: Report, config: GPTConfig, rows: Rows, gemms: list[Gemm], times: dict[str, list[float]]
) -> None:
    linear = linear_flops(config, rows.tokens)
    whole = linear + attention_flops(config, rows.lengths)
    linears_alone = quotients(times["limit"], times["forward"])
    ways = ", ".join(f"{g.matrix} {g.way} {g.part}" for g in gemms)
    tokens_per_s = rows.tokens / min(times["forward"])
    report.ratio(
        "limit",
        "forward / limit",
        "forward_over_limit",
        [value * whole / linear for value in linears_alone],
        f"{len(rows.ids)} rows of {rows.lengths[0]}, base only; {tokens_per_s:,.0f} tokens/s",
    )
    report.ratio(
        "limit",
        "the same, attention not counted",
        "also.linears_over_limit",
        linears_alone,
        f"limit {linear / min(times['limit']) / 1e9:,.0f} GFLOP/s at {ways}",
    )
