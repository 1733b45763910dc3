"""model.gpt.GPT in float32: whatever is timed is first held against it.

float32: no value of a state differs by more than 2e-4. bfloat16: a row's states differ by at most
4 % of their norm, and the cosine of its pooled states is at least 0.999. Adapters must move what
they are put on by several times that, else equal results would say nothing.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from loadtest.bench.trunk import Adapter, Rows, Trunk
from model.gpt import GPT

FLOAT32_ATOL = 2e-4
RELATIVE = 0.04  # of the norm of a row's states, in dtypes below float32
COSINE = 0.999
MOVED = 3.0  # times RELATIVE


class Mismatch(Exception):
    """What was to be timed does not give the oracle's results."""


def under_adapter(gpt: GPT, adapter: Adapter | None) -> GPT:
    """A twin of gpt with the adapter's LoRA on it and all other parameters shared."""
    twin = copy.deepcopy(gpt, {id(p): p for p in gpt.parameters()})
    if adapter is not None:
        twin.load_adapter_state_dict(adapter.set.tensors, adapter.set.lora_alpha)
    return twin.eval()


@torch.inference_mode()
def expected(trunk: Trunk, rows: Rows, count: int) -> dict[int, Tensor]:
    """The oracle's states (T, C) of at most `count` rows, evenly chosen, by row."""
    chosen = {round(i * (len(rows.ids) - 1) / max(1, count - 1)) for i in range(count)}
    twins: dict[int, GPT] = {}
    states = {}
    for row in sorted(chosen):
        adapter = rows.adapters[row]
        is_first = id(adapter) not in twins
        if is_first:
            twins[id(adapter)] = under_adapter(trunk.gpt, adapter)
        states[row] = _states(twins[id(adapter)], rows.ids[row])
        if is_first and adapter is not None:
            _demand_moved(_states(trunk.gpt, rows.ids[row]), states[row])
    return states


def _states(gpt: GPT, ids: Tensor) -> Tensor:
    idx = ids[None]
    return gpt.hidden_states(idx, torch.ones_like(idx))[-1][0]


def _demand_moved(base: Tensor, moved: Tensor) -> None:
    if float((moved - base).norm() / base.norm()) < MOVED * RELATIVE:
        raise Mismatch("an adapter moves so little that any result would pass")


def check(
    what: str, found: Sequence[Tensor], reference: dict[int, Tensor], dtype: torch.dtype
) -> None:
    """found: states (T, C) a row. Raises Mismatch where a row of the reference has others."""
    for row, state in reference.items():
        difference = found[row].float() - state
        if dtype == torch.float32:
            worst = float(difference.abs().max())
            wrong = not worst <= FLOAT32_ATOL
            said = f"{worst:.2g} absolute"
        else:
            relative = float(difference.norm() / state.norm())
            cosine = float(F.cosine_similarity(found[row].float().mean(0), state.mean(0), dim=0))
            wrong = not (relative <= RELATIVE and cosine >= COSINE)
            said = f"{relative:.3f} of its norm, cosine {cosine:.5f}"
        if wrong:
            raise Mismatch(f"{what}: row {row} differs from the float32 oracle by {said}")


def check_trunk(what: str, trunk: Trunk, rows: Rows, count: int) -> dict[int, Tensor]:
    """The serving forward of these rows against the oracle; what the oracle says of them."""
    reference = expected(trunk, rows, count)
    check(what, trunk.run_rows(rows), reference, trunk.dtype)
    return reference
