"""tax: what adapters cost, beside the arithmetic that they add."""

from functools import partial

from loadtest.bench.gemm import attention_flops, linear_flops
from loadtest.bench.oracle import check_trunk
from loadtest.bench.pairs import in_turn, quotients, speedups
from loadtest.bench.plan import Plan
from loadtest.bench.report import Report
from loadtest.bench.trunk import Trunk
from model.config import LORA_SITES, GPTConfig

USUAL, WIDE = 8, 32  # ranks


def flop_limit(config: GPTConfig, lengths: list[int], rank: int) -> float:
    """Base arithmetic over that with LoRA of `rank` at every site: what a perfect server has."""
    base = linear_flops(config, sum(lengths)) + attention_flops(config, lengths)
    widths = sum(into + out for into, out in LORA_SITES.values()) * config.n_embd
    return base / (base + 2.0 * rank * widths * config.n_layer * sum(lengths))


def cases(plan: Plan) -> list[tuple[int, int]]:
    """(distinct adapters, rank)"""
    most = max(plan.sizes.adapters)
    found = [(k, USUAL) for k in plan.sizes.adapters] + [(most, WIDE)]
    return found + [(most, rank) for rank in plan.shape.ranks if rank not in (USUAL, WIDE)]


def measure(plan: Plan, trunk: Trunk, report: Report) -> None:
    sizes = plan.sizes
    lengths = [sizes.uniform] * (sizes.batch_tokens // sizes.uniform)
    batches = {"base": trunk.rows(lengths)}
    for k, rank in cases(plan):
        batches[f"k{k}_r{rank}"] = trunk.rows(lengths, trunk.adapters(k, rank))
    for name, rows in batches.items():
        check_trunk(f"tax, {name}", trunk, rows, sizes.checked_rows)

    times = in_turn(
        {name: partial(trunk.run, rows) for name, rows in batches.items()}
        | {"without": lambda: trunk.run_without_lora(batches["base"])},
        sizes.rounds,
        sizes.round_s * len(batches) / 2,
    )
    for k, rank in cases(plan):
        required = rank in (USUAL, WIDE)
        report.ratio(
            "tax",
            f"{k} adapters of rank {rank} / base only",
            f"adapters_over_base.k{k}_r{rank}" if required else f"also.k{k}_r{rank}",
            speedups(times, f"k{k}_r{rank}", "base"),
            f"FLOP limit {flop_limit(trunk.config, lengths, rank):.3f}",
        )
    report.ratio(
        "tax",
        "base-only rows beside resident adapters / without any",
        "also.base_rows_over_without",
        quotients(times["without"], times["base"]),
    )
