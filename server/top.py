"""Usage by name: totals within a bound, and the series that an exposition shows of them."""

import heapq
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

MOST = 100  # names that have series of their own
MANY = 10_000  # names whose totals are kept
MOST_VIEWS = 64
OTHER = "other"

Keeps = Callable[[str], bool]
Shown = dict[str, list[int]]  # amounts by label


class View:
    """The series of some of the names: at most `most` of them, and the rest together as `other`.

    Which names are shown is decided at each exposition. A series never goes down: a name that joins
    the most used begins at 0, and what a name that leaves them had is added to `other`.
    """

    def __init__(self, columns: int, most: int, keeps: Keeps) -> None:
        self.most, self.keeps = most, keeps
        self.shown: Shown = {OTHER: [0] * columns}
        self.pending: set[str] = set()  # names that were counted since the last exposition
        self._seen: Shown = {}  # its names, and their totals as of the last exposition

    def update(self, totals: Shown) -> None:
        """Add what came since the last exposition."""
        kept = [name for name in self.pending if name in self._seen or self.keeps(name)]
        since = {name: self._since(name, totals[name]) for name in kept}
        self._seen |= {name: list(totals[name]) for name in kept}
        self.pending.clear()
        top = set(heapq.nlargest(self.most, self._seen, key=lambda name: totals[name][0]))
        for name in set(self.shown) - top - {OTHER}:
            self._add(OTHER, self.shown.pop(name))
        for name, amounts in since.items():
            self._add(name if name in top else OTHER, amounts)

    def forget(self, name: str, amounts: Sequence[int]) -> None:
        """Add a name, whose total is kept no longer, to `other`."""
        self.pending.discard(name)
        if name in self._seen or self.keeps(name):
            self._add(OTHER, self._since(name, amounts))
            self._seen.pop(name, None)

    def _since(self, name: str, amounts: Sequence[int]) -> list[int]:
        seen = self._seen.get(name)
        return (
            list(amounts) if seen is None else [a - s for a, s in zip(amounts, seen, strict=True)]
        )

    def _add(self, label: str, amounts: Sequence[int]) -> None:
        so_far = self.shown.setdefault(label, [0] * len(amounts))
        for column, amount in enumerate(amounts):
            so_far[column] += amount


class Usage:
    """What each name used, in `columns` amounts, since the start. Thread-safe.

    The first amount decides which names are the most used. Beyond `many` names the totals of the
    least used half are forgotten, so memory is bounded; no view's sums change by it.
    """

    def __init__(self, columns: int, most: int = MOST, many: int = MANY) -> None:
        self.columns, self.most, self.many = columns, most, many
        self._lock = threading.Lock()
        self._totals: Shown = {}
        self._counted: set[str] = set()  # names, since the views were last told
        everybodys = View(columns, most, lambda name: True)
        self._views: dict[Hashable, View] = {None: everybodys}

    def count(self, name: str, *amounts: int) -> None:
        with self._lock:
            totals = self._totals.get(name) or self._first(name)
            for column, amount in enumerate(amounts):
                totals[column] += amount
            self._counted.add(name)

    def total(self, name: str) -> list[int]:
        with self._lock:
            return list(self._totals.get(name, [0] * self.columns))

    def shown(self, view: Hashable = None, keeps: Keeps = lambda name: True) -> Shown:
        """The series of a view; one that is asked for the first time is made, with all names that
        `keeps` takes."""
        with self._lock:
            if view not in self._views:
                if len(self._views) > MOST_VIEWS:
                    del self._views[list(self._views)[1]]
                self._views[view] = View(self.columns, self.most, keeps)
                self._views[view].pending |= self._totals.keys()
            self._tell_views()
            its = self._views[view]
            its.update(self._totals)
            return {label: list(amounts) for label, amounts in its.shown.items()}

    def keep_only(self, names: Collection[str]) -> None:
        """Forget the other names: what they used goes to `other`."""
        with self._lock:
            self._forget(self._totals.keys() - set(names))

    def _first(self, name: str) -> list[int]:
        if len(self._totals) >= self.many:
            by_use = sorted(self._totals, key=lambda name: self._totals[name][0])
            self._forget(by_use[: len(by_use) // 2])
        self._totals[name] = [0] * self.columns
        return self._totals[name]

    def _tell_views(self) -> None:
        for view in self._views.values():
            view.pending |= self._counted
        self._counted.clear()

    def _forget(self, names: Collection[str]) -> None:
        self._tell_views()
        for name in names:
            amounts = self._totals.pop(name)
            for view in self._views.values():
                view.forget(name, amounts)


class TopAdapters(Collector):
    """Rows and tokens by adapter name."""

    def __init__(self, most: int = MOST, many: int = MANY) -> None:
        self.usage = Usage(2, most, many)

    def count(self, name: str, rows: int, tokens: int) -> None:
        self.usage.count(name, rows, tokens)

    def collect(self) -> Iterator[Metric]:
        return self._families(self.usage.shown())

    def collect_own(self, patterns: tuple[str, ...], keeps: Keeps) -> Iterator[Metric]:
        """The same of the names alone that `keeps` takes; `patterns` tell such views apart."""
        return self._families(self.usage.shown(patterns, keeps))

    def describe(self) -> Iterator[Metric]:
        """So that registering it settles nothing yet."""
        return iter(())

    def _families(self, shown: Shown) -> Iterator[Metric]:
        rows = CounterMetricFamily(
            "trunkline_adapter_rows", "Rows run, by adapter.", labels=["adapter"]
        )
        tokens = CounterMetricFamily(
            "trunkline_adapter_tokens", "Tokens run, by adapter.", labels=["adapter"]
        )
        for name, (its_rows, its_tokens) in shown.items():
            rows.add_metric([name], its_rows)
            tokens.add_metric([name], its_tokens)
        yield rows
        yield tokens


_KEY_FAMILIES = {  # by column
    "requests": "Answered requests, by API key.",
    "refusals": "Of an API key's requests those that were answered with an error.",
    "rows": "Rows run, by API key.",
    "tokens": "Tokens run, by API key.",
}


class TopKeys(Collector):
    """Requests, refusals, rows and tokens by API key; a revoked key's are added to `other`.

    `names` gives the live keys' names by id.
    """

    def __init__(self, most: int = MOST) -> None:
        self.usage = Usage(len(_KEY_FAMILIES), most)
        self.names: Callable[[], dict[str, str]] = dict

    def answered(self, key: str, refused: bool) -> None:
        self.usage.count(key, 1, int(refused))

    def ran(self, key: str, rows: int, tokens: int) -> None:
        self.usage.count(key, 0, 0, rows, tokens)

    def collect(self) -> Iterator[Metric]:
        names = self.names()
        self.usage.keep_only(names)
        return _key_families(self.usage.shown(), names)

    def collect_own(self, key: str) -> Iterator[Metric]:
        """The usage of one key, as its own series."""
        return _key_families({key: self.usage.total(key)}, self.names())

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _key_families(shown: Shown, names: dict[str, str]) -> Iterator[Metric]:
    for column, (name, text) in enumerate(_KEY_FAMILIES.items()):
        family = CounterMetricFamily(f"trunkline_key_{name}", text, labels=["key", "name"])
        for key, amounts in shown.items():
            family.add_metric([key, names.get(key, "")], amounts[column])
        yield family
