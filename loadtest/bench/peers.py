"""peers: what else serves many adapters, on the same weights and the same inputs.

All peers run model.gpt.GPT in the serving dtype, padded where lengths differ, without the mask
where they don't: PEFT's mixed batch; the rows grouped by adapter, a forward each, every adapter's
LoRA in a model of its own, so that nothing is spent on switching; and each adapter merged into
matrices of its own first. trunkline's time has the planning of the batch in it, theirs the padding.
"""

import copy
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loadtest.bench import minilm
from loadtest.bench.oracle import check, expected, under_adapter
from loadtest.bench.padding import Padded, pad, unpad
from loadtest.bench.pairs import in_turn, speedups
from loadtest.bench.plan import Plan
from loadtest.bench.report import Report
from loadtest.bench.trunk import Adapter, Rows, Trunk, mixed_lengths
from model.config import LORA_SITES, MAIN_MATRICES
from model.gpt import GPT
from model.lora import Site

SORTED_ROWS = 8  # of a batch where a peer's rows are sorted by length first
SITE_OF = dict(zip(MAIN_MATRICES, LORA_SITES, strict=True))


@dataclass
class PeftPeer:
    """PEFT's mixed batch: one forward, each row under the adapter that is named for it."""

    model: nn.Module
    names: dict[int, str]  # by id of the adapter

    @classmethod
    def of(cls, trunk: Trunk, adapters: Sequence[Adapter]) -> "PeftPeer":
        peft = importlib.import_module("peft")  # an extra
        rank = next(iter(adapters[0].weights.lora.values()))[0].shape[0]
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=adapters[0].set.lora_alpha,
            target_modules=["c_attn", "c_proj", "c_fc"],
        )
        names = {id(adapter): f"a{index}" for index, adapter in enumerate(adapters)}
        model = peft.PeftModel(Padded(copy.deepcopy(trunk.gpt)), config, adapter_name="a0")
        for name in list(names.values())[1:]:
            model.add_adapter(name, config)
        with torch.no_grad():
            for adapter in adapters:
                _fill(model.base_model.model.gpt, names[id(adapter)], adapter.set.tensors)
        return cls(model.to(trunk.dtype).eval(), names)

    @torch.inference_mode()
    def run(self, rows: Rows) -> list[Tensor]:
        names = [self.names[id(adapter)] for adapter in rows.adapters]
        return unpad(self.model(*pad(rows.ids), adapter_names=names), rows.ids)

    def run_sorted(self, rows: Rows) -> list[Tensor]:
        """Rows of like lengths in batches of their own, so that less is padding."""
        order = sorted(range(len(rows.ids)), key=lambda row: len(rows.ids[row]))
        found: list[Tensor] = [torch.empty(0)] * len(order)
        for start in range(0, len(order), SORTED_ROWS):
            some = order[start : start + SORTED_ROWS]
            part = Rows([rows.ids[row] for row in some], [rows.adapters[row] for row in some])
            for row, state in zip(some, self.run(part), strict=True):
                found[row] = state
        return found


def _fill(gpt: GPT, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Put an adapter file's matrices into PEFT's layers."""
    for layer in range(gpt.config.n_layer):
        for matrix, site in SITE_OF.items():
            module: Any = gpt.get_submodule(f"transformer.h.{layer}.{matrix}")
            path = f"transformer.h.{layer}.{site}"
            module.lora_A[name].weight.copy_(tensors[f"{path}.A.weight"])
            module.lora_B[name].weight.copy_(tensors[f"{path}.B.weight"])


def by_adapter(rows: Rows) -> list[tuple[Adapter, list[int]]]:
    """Each adapter with its rows."""
    groups: dict[int, tuple[Adapter, list[int]]] = {}
    for row, adapter in enumerate(rows.adapters):
        assert adapter is not None
        groups.setdefault(id(adapter), (adapter, []))[1].append(row)
    return list(groups.values())


class OneAtATime:
    """A forward for each adapter, of its rows alone, by a GPT that has that adapter on."""

    def __init__(self, trunk: Trunk, adapters: Sequence[Adapter]) -> None:
        base = copy.deepcopy(trunk.gpt).to(trunk.dtype)
        self.models = {
            id(adapter): Padded(under_adapter(base, adapter).to(trunk.dtype))
            for adapter in adapters
        }

    @torch.inference_mode()
    def run(self, rows: Rows) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(rows.ids)
        for adapter, some in by_adapter(rows):
            ids = [rows.ids[row] for row in some]
            states = unpad(self.models[id(adapter)](*pad(ids)), ids)
            for row, state in zip(some, states, strict=True):
                found[row] = state
        return found


class Merged:
    """Each adapter added to matrices that every layer has of its own, then a forward."""

    def __init__(self, trunk: Trunk) -> None:
        own = dataclasses.replace(trunk.config, share_main_matrices=False)
        gpt = GPT(own)
        gpt.load_state_dict(trunk.gpt.state_dict())
        self.model = Padded(gpt.to(trunk.dtype)).eval()
        self.sites: list[tuple[Site, Tensor]] = [
            ((layer, site), gpt.get_parameter(f"transformer.h.{layer}.{matrix}.weight"))
            for layer in range(own.n_layer)
            for matrix, site in SITE_OF.items()
        ]
        self.base = [weight.detach().clone() for _, weight in self.sites]

    @torch.inference_mode()
    def run(self, rows: Rows) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(rows.ids)
        for adapter, some in by_adapter(rows):
            for (site, weight), base in zip(self.sites, self.base, strict=True):
                a, b_t = adapter.weights.lora[site]
                torch.addmm(base, b_t.t(), a, out=weight.data)
            ids = [rows.ids[row] for row in some]
            for row, state in zip(some, unpad(self.model(*pad(ids)), ids), strict=True):
                found[row] = state
        return found


def run_one_at_a_time(trunk: Trunk, rows: Rows) -> list[Tensor]:
    """trunkline's own encoder, a forward for each adapter."""
    found: list[Tensor] = [torch.empty(0)] * len(rows.ids)
    for adapter, some in by_adapter(rows):
        part = Rows([rows.ids[row] for row in some], [adapter] * len(some))
        for row, state in zip(some, trunk.run_rows(part), strict=True):
            found[row] = state
    return found


def measure(plan: Plan, trunk: Trunk, report: Report) -> None:
    sizes = plan.sizes
    # As many rows an adapter, on average, as in a whole batch under the most adapters.
    most = max(sizes.adapters) * sizes.peer_tokens // sizes.batch_tokens
    adapters = trunk.adapters(most, plan.shape.ranks[0])
    count = sizes.peer_tokens // sizes.uniform
    uniform = trunk.rows([sizes.uniform] * count, adapters)
    mixed = trunk.rows(mixed_lengths(count * sizes.uniform), adapters)
    if importlib.util.find_spec("peft") is None:
        report.left_out("peers, PEFT", "the package peft is not installed")
    else:
        _measure_peft(plan, trunk, report, adapters, uniform, mixed)
    _measure_one_at_a_time(plan, trunk, report, adapters, mixed)
    if plan.minilm is not None:
        minilm.measure(plan, trunk, report)


def _measure_peft(
    plan: Plan,
    trunk: Trunk,
    report: Report,
    adapters: Sequence[Adapter],
    uniform: Rows,
    mixed: Rows,
) -> None:
    sizes = plan.sizes
    peer = PeftPeer.of(trunk, adapters)
    actions: dict[str, Callable[[], list[Tensor]]] = {}
    for name, rows in (("uniform", uniform), ("mixed", mixed)):
        actions[f"trunkline {name}"] = partial(trunk.run_rows, rows)
        actions[f"PEFT {name}"] = partial(peer.run, rows)
        reference = expected(trunk, rows, sizes.checked_rows)
        for who in ("trunkline", "PEFT"):
            check(f"{who}, {name}", actions[f"{who} {name}"](), reference, plan.dtype)
    if sizes.further:
        actions["PEFT sorted"] = partial(peer.run_sorted, mixed)
        check("PEFT sorted", peer.run_sorted(mixed), reference, plan.dtype)
    times = in_turn(actions, sizes.slow_rounds, sizes.round_s, warm=True)
    what = f"PEFT's mixed batch, {len(adapters)} adapters"
    for name, note in (
        ("uniform", ""),
        ("mixed", f"{len(mixed.ids)} rows padded to {max(mixed.lengths)}"),
    ):
        values = speedups(times, f"trunkline {name}", f"PEFT {name}")
        report.ratio("peers", f"{what}, {name} lengths", f"over_peft.{name}", values, note)
    if sizes.further:
        report.ratio(
            "peers",
            f"{what}, mixed lengths, sorted",
            "also.over_peft_sorted",
            speedups(times, "trunkline mixed", "PEFT sorted"),
            f"rows of like lengths in batches of {SORTED_ROWS}",
        )


def _measure_one_at_a_time(
    plan: Plan, trunk: Trunk, report: Report, adapters: Sequence[Adapter], mixed: Rows
) -> None:
    sizes = plan.sizes
    actions: dict[str, Callable[[], list[Tensor]]] = {
        "mixed batch": partial(trunk.run_rows, mixed),
        "one adapter at a time": partial(OneAtATime(trunk, adapters).run, mixed),
    }
    keys = {"one adapter at a time": "over_one_at_a_time"}
    if sizes.further:
        actions["merge, then forward"] = partial(Merged(trunk).run, mixed)
        actions["one at a time by trunkline's own encoder"] = partial(
            run_one_at_a_time, trunk, mixed
        )
        keys["merge, then forward"] = "also.over_merge_then_forward"
        keys["one at a time by trunkline's own encoder"] = "also.over_one_at_a_time_encoder"
    reference = expected(trunk, mixed, sizes.checked_rows)
    for name, action in actions.items():
        check(name, action(), reference, plan.dtype)
    times = in_turn(actions, sizes.slow_rounds, sizes.round_s, warm=True)
    note = f"{len(adapters)} adapters, mixed lengths"
    for name, key in keys.items():
        report.ratio("peers", name, key, speedups(times, "mixed batch", name), note)
