"""Forecast: whether the rows that wait will be run in time, by their key's share and their line's.

The device's time is shared out twice by max-min fairness, as the queue deals it: first over keys by
what each asks for, then each key's share over the lines of the key. So a key with many lines has no
more of the device than a key with one.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from server.engine.lately import PERIOD_S, Lately
from server.engine.lines import KeyLines, LineKey
from server.engine.outlook import Outlook, Values, water_level
from server.engine.rounds import Rounds

# A forecast holds until a batch has gone, or as much of what it counts with has changed as this
# share of the capacity. It is kept at least for KEPT_S for each key or line in it, so that it costs
# a few percent of a core at most, however many there are.
STALE, KEPT_S = 0.02, 20e-6
# What comes is expected to be so many times what came lately: it goes before a line that is long,
# so a machine that gets slower gets slower for that line alone.
CAUTION = 1.25
# `may_be_late` looks at so many keys that are over their share; where there are more, it says yes.
LOOKED_AT = 8


class Moment(NamedTuple):
    """What a forecast starts from."""

    on_device: int  # tokens that go before all that wait
    waiting: int  # tokens
    deals: int  # batches dealt so far
    rate: float  # tokens a second that the device runs
    most_s: float  # a row is late after this time
    now: float  # time.monotonic()

    @property
    def capacity(self) -> float:
        return self.rate * self.most_s - self.on_device


@dataclass(frozen=True)
class _Asked:
    """What the members of one level asked for, all keys or the lines of one key."""

    waiting: Values  # tokens
    tokens: int  # that wait in all
    weights: Values
    coming: Values  # tokens a second
    places: Mapping[Hashable, int]  # by the member's name
    deals: int
    at: float

    def holds(self, waiting: int, moment: Moment) -> bool:
        age = moment.now - self.at
        if 0 <= age < KEPT_S * len(self.waiting):
            return True
        same = abs(waiting - self.tokens) < STALE * moment.capacity
        return same and moment.deals == self.deals and age < PERIOD_S

    def level(self, most_s: float, above: Outlook | None, capacity: float, rate: float) -> "_Level":
        demands: Values = self.waiting + self.coming * most_s
        outlook = water_level(demands, self.weights, self.coming, capacity, rate)
        return _Level(self, most_s, above, demands, float(demands.sum()), outlook)


@dataclass(frozen=True)
class _Level:
    """An outlook, and what it was made of."""

    asked: _Asked
    most_s: float
    above: Outlook | None  # of the keys, where this is one of lines
    demands: Values  # tokens until most_s
    demand: float  # of all
    outlook: Outlook

    def spare_for(self, tokens: float, demand: float) -> bool:
        """Whether all that is asked for can be done in time, with so many tokens that wait now."""
        return math.isinf(self.outlook.reach) and tokens <= demand + self.outlook.spare


class Forecast:
    """Used under the queue's lock."""

    def __init__(self, keys: Rounds[str, KeyLines], weight_of: Callable[[LineKey], float]) -> None:
        self._keys, self._weight_of = keys, weight_of
        self._lately: Lately[str] = Lately()  # tokens dealt, by key
        self._lately_of: dict[str, Lately[LineKey]] = {}  # of each key, by line
        self._of_keys: _Level | None = None
        self._of_lines: dict[str, _Level] = {}  # by key

    def dealt(self, sent: Mapping[LineKey, int], now: float) -> None:
        for line, tokens in sent.items():
            key = line[0]
            self._lately.note(key, tokens, now)
            if key not in self._lately_of:
                self._lately_of[key] = Lately()
            self._lately_of[key].note(line, tokens, now)

    def late_s(self, lines: Iterable[LineKey], moment: Moment) -> float:
        """Seconds by which a new row's turn would come after `most_s`; 0 where it comes in time.

        The greatest of these lines.
        """
        if moment.capacity < 0:
            return moment.on_device / moment.rate - moment.most_s
        return max((self._late_s(line, moment) for line in lines), default=0.0)

    def may_be_late(self, moment: Moment) -> bool:
        """Whether `late_s` may be above 0 for any line; it may say yes where none is."""
        if moment.capacity < 0:
            return True
        level = self._level_of_keys(moment)
        if math.isinf(level.outlook.reach):
            return moment.waiting > level.outlook.spare
        over = level.demands > level.outlook.reach
        names = [str(name) for name, place in level.asked.places.items() if over[place]]
        return len(names) > LOOKED_AT or any(self._has_late_line(name, moment) for name in names)

    def _has_late_line(self, name: str, moment: Moment) -> bool:
        key = self._keys.get(name)
        if key is None:
            return False
        level = self._level_of_lines(key, self._level_of_keys(moment).outlook, moment)
        longest = (level.asked.waiting / level.asked.weights).max(initial=0.0)
        return bool(longest > level.outlook.reach)

    def _late_s(self, name: LineKey, moment: Moment) -> float:
        key = self._keys.get(name[0])
        line = key.get(name) if key is not None else None
        if key is None or line is None:
            return 0.0
        above = self._fitting_level_of_keys(key, moment).outlook
        if math.isinf(above.reach):
            return 0.0
        level = self._fitting_level_of_lines(key, above, moment).outlook
        return max(0.0, line.tokens / line.weight - level.reach) * level.slope

    def _fitting_level_of_keys(self, key: KeyLines, moment: Moment) -> _Level:
        """The last level, or a new one if the key has outgrown the room of the last."""
        level = self._level_of_keys(moment)
        place = level.asked.places.get(key.key)
        demand = level.demands[place] if place is not None else 0.0
        if math.isinf(level.outlook.reach) and not level.spare_for(key.tokens, demand):
            self._of_keys = None
            return self._level_of_keys(moment)
        return level

    def _fitting_level_of_lines(self, key: KeyLines, above: Outlook, moment: Moment) -> _Level:
        level = self._level_of_lines(key, above, moment)
        room = level.spare_for(key.tokens, level.demand)
        if math.isinf(level.outlook.reach) and not room:
            del self._of_lines[key.key]
            return self._level_of_lines(key, above, moment)
        return level

    def _level_of_keys(self, moment: Moment) -> _Level:
        level = self._of_keys
        fresh = level is not None and level.asked.holds(moment.waiting, moment)
        if level is not None and fresh and level.most_s == moment.most_s:
            return level
        asked = level.asked if level is not None and fresh else self._asked_by_keys(moment)
        made = asked.level(moment.most_s, None, moment.capacity, moment.rate)
        if level is None or moment.most_s >= level.most_s:  # one of a nearer deadline is not kept
            self._of_keys = made
        return made

    def _level_of_lines(self, key: KeyLines, above: Outlook, moment: Moment) -> _Level:
        level = self._of_lines.get(key.key)
        fresh = level is not None and level.asked.holds(key.tokens, moment)
        same = level is not None and (level.most_s, level.above) == (moment.most_s, above)
        if level is not None and fresh and same:
            return level
        asked = level.asked if level is not None and fresh else self._asked_by_lines(key, moment)
        # The key may have `reach` tokens run in time, so many a second.
        made = asked.level(moment.most_s, above, above.reach, 1 / above.slope)
        if level is None or moment.most_s >= level.most_s or not fresh:
            self._of_lines[key.key] = made
        return made

    def _asked_by_keys(self, moment: Moment) -> _Asked:
        coming = self._lately.rates(moment.now)
        waiting = {key.key: key.tokens for key in self._keys if key.jobs}
        self._forget_all_but(coming.keys() | waiting.keys())
        return _asked(waiting, coming, lambda key: 1.0, moment)

    def _asked_by_lines(self, key: KeyLines, moment: Moment) -> _Asked:
        lately = self._lately_of.get(key.key)
        coming = lately.rates(moment.now) if lately is not None else {}
        waiting = {line.name: line.tokens for line in key if line.jobs}
        return _asked(waiting, coming, self._weight_of, moment)

    def _forget_all_but(self, keys: Collection[str]) -> None:
        for known in (self._lately_of, self._of_lines):
            for key in [key for key in known if key not in keys]:
                del known[key]


Name = TypeVar("Name", bound=Hashable)


def _asked(
    waiting: Mapping[Name, int],
    coming: Mapping[Name, float],
    weight_of: Callable[[Name], float],
    moment: Moment,
) -> _Asked:
    names = [*waiting, *(name for name in coming if name not in waiting)]
    return _Asked(
        np.array([waiting.get(name, 0) for name in names], np.float64),
        sum(waiting.values()),
        np.array([weight_of(name) for name in names], np.float64),
        CAUTION * np.array([coming.get(name, 0.0) for name in names], np.float64),
        {name: place for place, name in enumerate(names)},
        moment.deals,
        moment.now,
    )
