"""Outlook: how many tokens may wait for the last of them to be run in time."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]  # (N,): one for each member of a round robin


class Demand(NamedTuple):
    """What one member of a round robin, a key or a line of a key, asks of the device in a time."""

    tokens: float  # that wait now, and that come in this time if they come as they did lately
    weight: float  # its share, 1 unless said otherwise
    rate: float  # tokens a second that come


class Outlook(NamedTuple):
    """A member's last token is run in time while its tokens over its weight are within `reach`.

    Where all that is asked of the device can be done in time, `reach` is infinite: then a member
    may have `spare` tokens more than its demand.
    """

    reach: float
    spare: float
    slope: float  # seconds that each further token over the weight is late


def outlook(demands: Iterable[Demand], capacity: float, rate: float) -> Outlook:
    """`water_level` of these demands."""
    tokens, weights, rates = np.array([*demands], np.float64).reshape(-1, 3).T
    return water_level(tokens, weights, rates, capacity, rate)


def water_level(
    tokens: Values, weights: Values, rates: Values, capacity: float, rate: float
) -> Outlook:
    """The outlook of a device that does `capacity` tokens in this time, `rate` a second.

    While the last of a member's L tokens (over its weight) waits, deficit round robin gives every
    other member as much by weight, or all that it asks for. So L is the level to which capacity
    fills the demands: max-min fairness, by water-filling (Bertsekas and Gallager 1992, 6.5.2).
    """
    capacity, whole = max(capacity, 0.0), weights.sum()
    order = np.argsort(tokens / weights)
    tokens, weights, rates = tokens[order], weights[order], rates[order]
    left = capacity - _before(tokens)  # when all smaller demands are met
    weight = whole - _before(weights)  # of this demand and all larger ones
    unmet = tokens * weight > left * weights
    if not unmet.any():
        return Outlook(math.inf, float(capacity - tokens.sum()), 1 / rate)
    first = int(unmet.argmax())
    rest = max(rate - _before(rates)[first], rate * weight[first] / whole)  # at least its share
    return Outlook(float(left[first] / weight[first]), 0.0, float(weight[first] / rest))


def _before(values: Values) -> Values:
    """The sum of all values before each one."""
    sums: Values = np.cumsum(values) - values
    return sums
