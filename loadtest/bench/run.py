"""A whole bench: sections one after the other on one trunk, then table and line."""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loadtest.bench import limit, packing, peers, scale, served, swap, tax
from loadtest.bench.plan import Plan
from loadtest.bench.report import Report
from loadtest.bench.trunk import Trunk

Section = Callable[[Plan, Trunk, Report], None]

SECTIONS: Mapping[str, Section] = {
    "limit": limit.measure,
    "tax": tax.measure,
    "packing": packing.measure,
    "peers": peers.measure,
    "served": served.measure,
    "swap": swap.measure,
    "scale": scale.measure,
}


def run(plan: Plan, sections: Sequence[str]) -> Report:
    """Raises Mismatch, before it is timed, for what does not give the oracle's results."""
    if plan.threads:
        torch.set_num_threads(plan.threads)
    torch.manual_seed(0)
    trunk = Trunk(plan.shape.config(), plan.dtype)
    report = Report(
        dtype=str(plan.dtype).removeprefix("torch."),
        shape=plan.shape_name,
        threads=torch.get_num_threads(),
        operators=trunk.encoder.operators.name,
        rounds=plan.sizes.rounds,
    )
    for name in sections:
        began = time.monotonic()
        print(f"{name} ...", end="", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=plan.scratch) as scratch:
            SECTIONS[name](replace(plan, scratch=Path(scratch)), trunk, report)
        print(f" {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return report
