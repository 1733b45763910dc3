"""limit: the forward beside the machine's own matrix rate (loadtest/bench/gemm.py), the better of
its two ways, in the same dtype on as many threads.

The forward is counted by its matrix arithmetic: 2 per weight and token, and 4 T^2 C a layer for a
row's attention, as if that could run at the rate of the linears. All else that it does is
overhead, the planning of the batch too.
"""

import statistics

from loadtest.bench.gemm import Apart, Together, attention_flops, linear_flops
from loadtest.bench.oracle import check_trunk
from loadtest.bench.pairs import in_turn, quotients
from loadtest.bench.plan import Plan
from loadtest.bench.report import Report
from loadtest.bench.trunk import Trunk


def measure(plan: Plan, trunk: Trunk, report: Report) -> None:
    sizes, config = plan.sizes, trunk.config
    rows = trunk.rows([sizes.uniform] * (sizes.batch_tokens // sizes.uniform))
    check_trunk("limit", trunk, rows, sizes.checked_rows)
    limits: dict[str, Together | Apart] = {
        "together": Together(config, plan.dtype, rows.tokens),
        "apart": Apart(config, plan.dtype, rows.tokens),
    }
    times = in_turn(
        {"forward": lambda: trunk.run(rows)} | {name: it.run for name, it in limits.items()},
        sizes.rounds,
        1.5 * sizes.round_s,
    )
    better, other = sorted(limits, key=lambda name: statistics.median(times[name]))
    linear = linear_flops(config, rows.tokens)
    whole = linear + attention_flops(config, rows.lengths)
    linears_alone = quotients(times[better], times["forward"])
    tokens_per_s = rows.tokens / statistics.median(times["forward"])
    report.ratio(
        "limit",
        "forward / limit",
        "forward_over_limit",
        [value * whole / linear for value in linears_alone],
        f"{len(rows.ids)} rows of {rows.lengths[0]}, base only; {tokens_per_s:,.0f} tokens/s",
    )
    report.ratio(
        "limit", "the same, attention not counted", "also.linears_over_limit", linears_alone
    )
    ways = ", ".join(f"{g.matrix} {g.way} {g.part}" for g in limits[better].gemms)
    report.ratio(
        "limit",
        "limit, GFLOP/s",
        "also.limit_gflops",
        [linear / spent / 1e9 for spent in times[better]],
        f"threads {better}: {ways}",
    )
    report.ratio(
        "limit",
        f"threads {other} / {better}",
        "also.other_limit_over_limit",
        quotients(times[better], times[other]),
    )
