"""The queue between admission and the device thread."""

import threading
from collections import deque
from collections.abc import Sequence

from server.engine.job import Job


class JobQueue:
    """First in, first out. Any thread puts; only the device thread takes."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            self._jobs.extend(jobs)
            self._changed.notify()

    def take(self, budget: int) -> list[Job]:
        """Jobs of at most `budget` tokens together, or a single longer one.

        Waits for the first; waits for no second. Empty only when the queue is closed.
        """
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            taken: list[Job] = []
            tokens = 0
            while self._jobs and (not taken or tokens + self._jobs[0].tokens <= budget):
                taken.append(self._jobs.popleft())
                tokens += taken[-1].tokens
            return taken

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
