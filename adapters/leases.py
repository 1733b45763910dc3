"""Leases: who still uses a version. A request takes one a version and gives it back once."""

import threading
from collections import defaultdict
from collections.abc import Callable


class Lease:
    """The right to use one digest, under one name, until `release`."""

    def __init__(self, book: "LeaseBook", name: str, digest: str) -> None:
        self._book, self.name, self.digest = book, name, digest

    def release(self) -> None:
        self._book._give_back(self)


class LeaseBook:
    """Every lease outstanding. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_digest: dict[str, set[Lease]] = defaultdict(set)
        self._by_name: dict[str, int] = defaultdict(int)
        self._drains: list[tuple[set[Lease], Callable[[], object]]] = []

    def take(self, name: str, digest: str) -> Lease:
        lease = Lease(self, name, digest)
        with self._lock:
            self._by_digest[digest].add(lease)
            self._by_name[name] += 1
        return lease

    def _give_back(self, lease: Lease) -> None:
        with self._lock:
            outstanding = self._by_digest.get(lease.digest, set())
            assert lease in outstanding, f"a lease of {lease.name} was released twice"
            outstanding.discard(lease)
            if not outstanding:
                del self._by_digest[lease.digest]
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
        """Call `then` when the leases of now are all released; returns how many they are.

        With none it is called before this returns. Later leases are not waited for.
        """
        with self._lock:
            outstanding = set(self._by_digest.get(digest, ()))
            if outstanding:
                self._drains.append((outstanding, then))
        if not outstanding:
            then()
        return len(outstanding)

    def of_digest(self, digest: str) -> int:
        with self._lock:
            return len(self._by_digest.get(digest, ()))

    def of_name(self, name: str) -> int:
        with self._lock:
            return self._by_name.get(name, 0)

    @property
    def total(self) -> int:
        with self._lock:
            return sum(map(len, self._by_digest.values()))
