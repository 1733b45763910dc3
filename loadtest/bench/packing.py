"""packing: real tokens a second on mixed lengths beside uniform ones of the same total."""

from loadtest.bench.oracle import check_trunk
from loadtest.bench.pairs import in_turn, speedups
from loadtest.bench.plan import Plan
from loadtest.bench.report import Report
from loadtest.bench.trunk import Trunk, mixed_lengths


def measure(plan: Plan, trunk: Trunk, report: Report) -> None:
    sizes = plan.sizes
    count = sizes.batch_tokens // sizes.uniform
    mixed = trunk.rows(mixed_lengths(count * sizes.uniform))
    uniform = trunk.rows([sizes.uniform] * count)
    adapters = trunk.adapters(max(sizes.adapters), plan.shape.ranks[0])
    mixed_adapters = trunk.rows(mixed_lengths(count * sizes.uniform), adapters)
    uniform_adapters = trunk.rows([sizes.uniform] * count, adapters)
    check_trunk("packing", trunk, mixed, sizes.checked_rows)
    check_trunk("packing, adapters", trunk, mixed_adapters, sizes.checked_rows)
    times = in_turn(
        {
            "mixed": lambda: trunk.run(mixed),
            "uniform": lambda: trunk.run(uniform),
            "mixed adapters": lambda: trunk.run(mixed_adapters),
            "uniform adapters": lambda: trunk.run(uniform_adapters),
        },
        sizes.rounds,
        2 * sizes.round_s,
    )
    rows = f"{len(mixed.ids)} rows of {min(mixed.lengths)} to {max(mixed.lengths)} tokens"
    report.ratio(
        "packing",
        "mixed / uniform lengths, base only",
        "mixed_over_uniform",
        speedups(times, "mixed", "uniform"),
        f"{rows}, {mixed.tokens} together",
    )
    report.ratio(
        "packing",
        f"the same with {len(adapters)} adapters",
        "also.mixed_over_uniform_adapters",
        speedups(times, "mixed adapters", "uniform adapters"),
    )
