"""TokenPermits: tokens that were admitted and not answered yet, in all and by API key."""

import threading
from collections import defaultdict

# Of what a key may hold, the last part is kept for those of its lines that hold little: a line may
# be so many times as long as what its key leaves free of it.
LINE_TIMES = 127


class TokenPermits:
    """The event loop takes, the device thread gives back.

    A key may hold as much as is free (Choudhury and Hahne 1998): one key that floods, over however
    many adapters, holds half, n of them leave 1/(n+1) free, and so there is always room for a key
    that asks for little.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._of_key: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        return self.limit - self.held

    def of_key(self, key: str) -> int:
        return self._of_key.get(key, 0)

    def take(self, tokens: int, key: str = "") -> None:
        with self._lock:
            self.held += tokens
            self._of_key[key] += tokens

    def give_back(self, tokens: int, key: str = "") -> None:
        with self._lock:
            self.held -= tokens
            self._of_key[key] -= tokens
            if not self._of_key[key]:
                del self._of_key[key]

    def lacking(self, tokens: int, key: str, longest: int) -> float:
        """Tokens of the key that must be given back before it may take so many; 0 if it may now.

        `longest` are the tokens of the longest of the lines that they are for.
        """
        own = self.of_key(key)
        left = (self.free - own) / 2  # of what the key may hold
        # With each token that the key gives back, it may take one more.
        of_line = (longest + tokens - LINE_TIMES * left) / (LINE_TIMES + longest / max(own, 1))
        return max(0.0, tokens - left, of_line)

    def crowded(self) -> bool:
        """Whether there may be a key that may not take one token."""
        if 3 * self.held < self.free:
            return False
        with self._lock:
            return any(self._near_its_part(own) for own in self._of_key.values())

    def _near_its_part(self, own: int) -> bool:
        return LINE_TIMES * (own + 2) > (LINE_TIMES - 2) * self.free
