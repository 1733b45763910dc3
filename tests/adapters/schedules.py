"""All orders in which operations of a library can meet: one thread runs at a time, from point to
point, and a depth-first search takes every choice of the next thread once.

The points are where one operation can meet what another did: before the write lock, and before a
file gets or loses its name in the store. While a thread has the write lock its points choose no
other, because what the others could do there they can do before or after as well; but the folder
can be looked at there, as a kill would leave it. The write lock is known to the scheduler, so that
a thread that waits for it is not chosen.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import pytest

from adapters.library import Library
from adapters.registry import Registry
from adapters.store import BlobStore, Incoming

Operation = Callable[[], object]
POINTS = [(BlobStore, "publish"), (BlobStore, "unlink"), (Registry, "add"), (Incoming, "discard")]
PRIVATE = {"discard"}  # an upload's own name is nothing to the other operations


class Schedule:
    """One run. `choices` are the threads to take, by their place among those that can run; where
    they end the first is taken. `trace` has (choice, how many could run) of each step."""

    def __init__(self, choices: list[int], at_point: Callable[[str], None]) -> None:
        self._choices, self._at_point = choices, at_point
        self.trace: list[tuple[int, int]] = []
        self._cond = threading.Condition()
        self._running: int | None = None
        self._waiting: dict[int, str] = {}  # thread -> the point where it waits
        self._owner: int | None = None  # of the write lock
        self._depth = 0
        self.errors: list[BaseException] = []
        self._numbers = threading.local()

    def run(self, operations: list[Operation]) -> None:
        threads = [
            threading.Thread(target=self._work, args=(number, operation))
            for number, operation in enumerate(operations)
        ]
        self._waiting = dict.fromkeys(range(len(threads)), "begin")
        for thread in threads:
            thread.start()
        while self._waiting:
            self._step()
        for thread in threads:
            thread.join(30)

    def _step(self) -> None:
        free = self._owner is None
        ready = [n for n, at in sorted(self._waiting.items()) if at != "lock" or free]
        step = len(self.trace)
        choice = self._choices[step] if step < len(self._choices) else 0
        self.trace.append((choice, len(ready)))
        with self._cond:
            self._running = ready[choice]
            self._cond.notify_all()
            assert self._cond.wait_for(lambda: self._running is None, 30), self._waiting
        self._at_point(", ".join(f"{n}: {at}" for n, at in sorted(self._waiting.items())))

    def _work(self, number: int, operation: Operation) -> None:
        self._numbers.mine = number
        with self._cond:
            assert self._cond.wait_for(lambda: self._running == number, 30)
        try:
            operation()
        except BaseException as error:
            self.errors.append(error)
        with self._cond:
            del self._waiting[number]
            self._running = None
            self._cond.notify_all()

    def point(self, name: str) -> None:
        """Wait here until this thread is chosen; other threads than the schedule's pass."""
        number = getattr(self._numbers, "mine", None)
        if number is None:
            return
        if self._owner == number:
            self.look(name)
            return
        with self._cond:
            self._waiting[number] = name
            self._running = None
            self._cond.notify_all()
            assert self._cond.wait_for(lambda: self._running == number, 30)

    def look(self, name: str) -> None:
        """The folder may be looked at here, and no other thread is chosen."""
        if getattr(self._numbers, "mine", None) is not None:
            self._at_point(name)

    @property
    def is_writing(self) -> bool:
        """Whether the thread that asks has the write lock."""
        return self._owner is not None and self._owner == getattr(self._numbers, "mine", None)

    # The write lock, in place of Database's own.

    def __enter__(self) -> None:
        number = getattr(self._numbers, "mine", -1)
        if self._owner != number:
            self.point("lock")
            assert self._owner is None
            self._owner = number
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None


class AtOnce:
    """The housekeeper's work, done by the thread that asks for it: it is the thread that waits."""

    def submit(self, work: Callable[..., object], *arguments: object) -> "AtOnce":
        work(*arguments)
        return self

    def result(self) -> None:
        return None

    def shutdown(self) -> None:
        return None


@contextmanager
def scheduled(library: Library, schedule: Schedule) -> Iterator[None]:
    """With the library's points and its write lock those of the schedule."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, method in POINTS:
            announce(patch, owner, method, schedule)
        patch.setattr(library.registry._database, "_writing", schedule)
        library._housekeeper.shutdown()
        patch.setattr(library, "_housekeeper", AtOnce())
        yield


def announce(patch: pytest.MonkeyPatch, owner: type, method: str, schedule: Schedule) -> None:
    """A point before the method, and where the folder is looked at one after it."""
    original = getattr(owner, method)
    before = schedule.look if method in PRIVATE else schedule.point

    def wrapped(*arguments: object, **options: object) -> object:
        before(method)
        try:
            return original(*arguments, **options)
        finally:
            if schedule.is_writing:
                schedule.point(f"after {method}")

    patch.setattr(owner, method, wrapped)


def every_schedule(run: Callable[[list[int]], list[tuple[int, int]]]) -> int:
    """Call `run` with the choices of every schedule; it returns the trace. How many there are."""
    choices: list[int] | None = []
    count = 0
    while choices is not None:
        choices = following(run(choices))
        count += 1
    return count


def following(trace: list[tuple[int, int]]) -> list[int] | None:
    """The choices of the next schedule in depth-first order, None after the last."""
    while trace:
        choice, options = trace.pop()
        if choice + 1 < options:
            return [c for c, _ in trace] + [choice + 1]
    return None
