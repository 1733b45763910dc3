"""Outlook: how long a line of the queue may be for its turn to come in time."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Demand(NamedTuple):
    """What a line is going to ask of the device until a time."""

    tokens: float  # that wait now, and that come until then as they came lately
    weight: float  # its share, 1 unless said otherwise
    rate: float  # tokens a second that come


class Outlook(NamedTuple):
    """A line's turn comes in time while it is no longer than `reach`, in tokens over its weight.

    Where all that is asked of the device can be done in time, `reach` is infinite: then a line may
    have `spare` tokens more than it was expected to have.
    """

    reach: float
    spare: float
    slope: float  # seconds later for a token over the weight too much


def outlook(demands: Iterable[Demand], capacity: float, rate: float) -> Outlook:
    """Of a device that does `capacity` tokens in this time, `rate` a second.

    While the last of a line's L tokens (over its weight) waits, deficit round robin gives every
    other line as much by weight, or all that it asks for. So L is the level to which capacity
    fills the demands: max-min fairness, by water-filling (Bertsekas and Gallager 1992, 6.5.2).
    """
    left = max(capacity, 0.0)
    ascending = sorted(demands, key=lambda demand: demand.tokens / demand.weight)
    weight = whole = sum(demand.weight for demand in ascending)
    coming = 0.0
    for demand in ascending:
        if demand.tokens * weight > left * demand.weight:
            rest = max(rate - coming, rate * weight / whole)  # nobody has less than its share
            return Outlook(left / weight, 0.0, weight / rest)
        left -= demand.tokens
        weight -= demand.weight
        coming += demand.rate
    return Outlook(math.inf, left, 1 / rate)
