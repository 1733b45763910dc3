"""What is asked for, seeded: lengths, adapters by popularity, a hot set that drifts, bursts."""

import bisect
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

# Public domain: Hamlet, act 3. Only letters and marks that a vocabulary of characters has.
PASSAGE = """To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles
And by opposing end them. To die, to sleep,
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to: 'tis a consummation
Devoutly to be wish'd. To die, to sleep;
To sleep, perchance to dream: ay, there's the rub:
For in that sleep of death what dreams may come,
When we have shuffled off this mortal coil,
Must give us pause: there's the respect
That makes calamity of so long life.
"""


@dataclass(frozen=True)
class Lengths:
    """Log-normal token counts around a median, clipped to low..high."""

    median: float = 48.0
    sigma: float = 0.8
    low: int = 4
    high: int = 512

    def draw(self, rng: random.Random) -> int:
        drawn = rng.lognormvariate(math.log(self.median), self.sigma)
        return max(self.low, min(self.high, round(drawn)))


class Popularity:
    """Zipf over `count` adapters: the i-th hottest is asked for in proportion to 1 / i^exponent.

    Which adapter is the i-th hottest is seeded, and moves on by `drift_per_minute` places.
    """

    def __init__(self, count: int, exponent: float, drift_per_minute: float, seed: int) -> None:
        weights = (1 / rank**exponent for rank in range(1, count + 1))
        self._cumulative = list(itertools.accumulate(weights))
        self._order = random.Random(seed).sample(range(count), count)
        self._drift_per_s = drift_per_minute / 60

    def adapter_of_rank(self, rank: int, at: float) -> int:
        """The adapter that is `rank`-th hottest (from 0) `at` seconds after the beginning."""
        return self._order[(rank + int(at * self._drift_per_s)) % len(self._order)]

    def draw(self, rng: random.Random, at: float) -> int:
        rank = bisect.bisect(self._cumulative, rng.random() * self._cumulative[-1])
        return self.adapter_of_rank(min(rank, len(self._order) - 1), at)


class Bursts:
    """Seeded windows of `length_s`, one in `every_s` on average, in which the rate is `factor`
    times as high. every_s 0: none."""

    def __init__(self, every_s: float, length_s: float, factor: float, seed: int) -> None:
        self.every_s, self.length_s, self.factor = every_s, length_s, factor
        self._rng = random.Random(seed)
        self._starts: list[float] = []

    def factor_at(self, at: float) -> float:
        if self.every_s <= 0:
            return 1.0
        while not self._starts or self._starts[-1] <= at:
            last = self._starts[-1] if self._starts else 0.0
            self._starts.append(last + self.length_s + self._rng.expovariate(1 / self.every_s))
        began = bisect.bisect(self._starts, at) - 1
        inside = began >= 0 and at < self._starts[began] + self.length_s
        return self.factor if inside else 1.0


class Passage:
    """Texts of a wanted number of tokens, cut out of the passage at its tokens' borders."""

    def __init__(self, text: str, spans: Sequence[tuple[int, int]]) -> None:
        self._text, self._spans = text, spans

    def cut(self, rng: random.Random, length: int) -> str:
        """About `length` tokens; the passage goes on from its beginning where it ends."""
        start = rng.randrange(len(self._spans))
        parts: list[str] = []
        while length > 0:
            taken = min(length, len(self._spans) - start)
            parts.append(self._text[self._spans[start][0] : self._spans[start + taken - 1][1]])
            length, start = length - taken, 0
        return "".join(parts) or self._text[0]


def random_ids(rng: random.Random, length: int, vocabulary: Sequence[int]) -> list[int]:
    """For a vocabulary that does not know the passage's characters."""
    return rng.choices(vocabulary, k=length)
