"""LoadFailures: what failed to load a moment ago, so that it is not tried again at once."""

import time
from collections import OrderedDict

from adapters.errors import TrunklineError

# A load that failed is not tried again for this long; requests meanwhile get the same error.
FAILURE_S = 1.0
MOST_FAILURES = 1024  # remembered at once


class LoadFailures:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._failed: OrderedDict[str, tuple[float, TrunklineError]] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._failed)

    def check(self, digest: str) -> None:
        """Raises the error of a load that failed within FAILURE_S."""
        failed = self._failed.get(digest)
        if failed is None:
            return
        if time.monotonic() - failed[0] < FAILURE_S:
            raise failed[1].again()
        del self._failed[digest]

    def note(self, digest: str, error: TrunklineError) -> None:
        now = time.monotonic()
        self._failed[digest] = (now, error)
        self._failed.move_to_end(digest)
        while next(iter(self._failed.values()))[0] <= now - FAILURE_S:
            self._failed.popitem(last=False)
        if len(self._failed) > MOST_FAILURES:
            self._failed.popitem(last=False)

    def forgive(self, digest: str) -> None:
        self._failed.pop(digest, None)
