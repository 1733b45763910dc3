"""Things measured in turn, A B A B ..., so that what is said of them holds on a noisy machine."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

Times = dict[str, list[float]]  # seconds of one call, a round each, by what was called


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def in_turn(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    round_s: float,
    warm: bool = False,
) -> Times:
    """Mean seconds of a call of each action in every round, all of them after a warm-up.

    A round goes through the actions in turn, again and again, for about `round_s` altogether.
    Where they are `warm` already, because they ran a moment ago and take long, it does so once.
    """
    turns = 1 if warm else _turns(actions, round_s)
    times: Times = {name: [] for name in actions}
    for _ in range(rounds):
        spent = dict.fromkeys(actions, 0.0)
        for _ in range(turns):
            for name, action in actions.items():
                spent[name] += seconds(action)
        for name, total in spent.items():
            times[name].append(total / turns)
    return times


def _turns(actions: Mapping[str, Callable[[], object]], round_s: float) -> int:
    once = sum(seconds(action) for action in actions.values())
    if once < round_s:  # the first call may have been a slow one
        once = sum(seconds(action) for action in actions.values())
    return max(1, math.ceil(round_s / once))


def quotients(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """over / under, round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def speedups(times: Times, of: str, over: str) -> list[float]:
    """How many times as fast `of` is as `over`, round by round."""
    return quotients(times[over], times[of])
