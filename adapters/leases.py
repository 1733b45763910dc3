"""Leases: who still uses a version. A request takes one a version and gives it back once."""

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from adapters.slot import Use

Place = TypeVar("Place", str, Use)


class Lease:
    """The right to use one digest, as one version of one name, until `release`."""

    def __init__(self, book: "LeaseBook", name: str, number: int, digest: str) -> None:
        self._book, self.name, self.number, self.digest = book, name, number, digest

    @property
    def use(self) -> Use:
        return self.name, self.number

    def release(self) -> None:
        self._book._give_back(self)


class LeaseBook:
    """Every lease outstanding. Thread-safe. It keeps nothing of names without leases."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_digest: dict[str, set[Lease]] = defaultdict(set)
        self._by_use: dict[Use, set[Lease]] = defaultdict(set)
        self._by_name: dict[str, int] = defaultdict(int)
        self._drains: list[tuple[set[Lease], Callable[[], object]]] = []

    def take(self, name: str, number: int, digest: str) -> Lease:
        lease = Lease(self, name, number, digest)
        with self._lock:
            self._by_digest[digest].add(lease)
            self._by_use[lease.use].add(lease)
            self._by_name[name] += 1
        return lease

    def _give_back(self, lease: Lease) -> None:
        with self._lock:
            assert lease in self._by_digest.get(lease.digest, ()), (
                f"a lease of {lease.name} was released twice"
            )
            _discard(self._by_digest, lease.digest, lease)
            _discard(self._by_use, lease.use, lease)
            self._by_name[lease.name] -= 1
            if not self._by_name[lease.name]:
                del self._by_name[lease.name]
            done = self._drained(lease)
        for then in done:  # outside the lock: they may take others
            then()

    def _drained(self, lease: Lease) -> list[Callable[[], object]]:
        done = []
        for drain in [drain for drain in self._drains if lease in drain[0]]:
            drain[0].discard(lease)
            if not drain[0]:
                self._drains.remove(drain)
                done.append(drain[1])
        return done

    def when_drained(self, digest: str, then: Callable[[], object]) -> int:
        """Call `then` when the digest's leases of now, under any name, are all released.

        Returns how many they are; with none it is called before this returns. Later leases are
        not waited for.
        """
        return self._when_ended(self._by_digest, digest, then)

    def when_use_ends(self, use: Use, then: Callable[[], object]) -> int:
        """The same for the leases of one version of one name."""
        return self._when_ended(self._by_use, use, then)

    def _when_ended(
        self, book: dict[Place, set[Lease]], place: Place, then: Callable[[], object]
    ) -> int:
        with self._lock:
            outstanding = set(book.get(place, ()))
            count = len(outstanding)  # the set shrinks as they are released
            if outstanding:
                self._drains.append((outstanding, then))
        if not count:
            then()
        return count

    def of_digest(self, digest: str) -> int:
        with self._lock:
            return len(self._by_digest.get(digest, ()))

    def of_use(self, use: Use) -> int:
        with self._lock:
            return len(self._by_use.get(use, ()))

    def of_name(self, name: str) -> int:
        with self._lock:
            return self._by_name.get(name, 0)

    def uses_of(self, digest: str) -> set[Use]:
        """The versions that have leases on the digest."""
        with self._lock:
            return {lease.use for lease in self._by_digest.get(digest, ())}

    @property
    def total(self) -> int:
        with self._lock:
            return sum(map(len, self._by_digest.values()))


def _discard(book: dict[Place, set[Lease]], place: Place, lease: Lease) -> None:
    book[place].discard(lease)
    if not book[place]:
        del book[place]
