"""AnswerMemory: the bytes of all answers that are computed, built or not read yet."""

from collections import Counter

from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine.errors import Overloaded

HELD = "trunkline.answer"  # of a request's state: its Held
COUNTED_BYTES = 64 << 10  # a smaller answer is not counted: its connection bounds it
RETRY_AFTER_S = 1


class AnswerMemory:
    """Bounds the bytes of large answers in the process, by key first. On the event loop only.

    A key may hold as much as it leaves free (Choudhury and Hahne 1998), so one key alone fills
    half, and there is room for others.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._by_key: Counter[str] = Counter()

    def take(self, key: str, size: int) -> "Held":
        """Raises Overloaded where the key, or all together, would hold too much.

        A server that holds no answer takes any.
        """
        if self.held and self._by_key[key] + size > self.limit - self.held:
            raise Overloaded(
                f"answers of {self._by_key[key] >> 20} MiB of this key are held for their clients, "
                "which is near its share, and this one may "
                f"have {size >> 20} MiB: read them, or ask for less",
                retry_after_s=RETRY_AFTER_S,
            )
        held = Held(self, key)
        held.grow(size)
        return held

    def count(self, key: str, size: int) -> None:
        """Count `size` bytes more for the key, or fewer."""
        self.held += size
        self._by_key[key] += size
        if not self._by_key[key]:
            del self._by_key[key]


class Held:
    """What one request holds of the memory."""

    def __init__(self, memory: AnswerMemory | None = None, key: str = "") -> None:
        self._memory, self._key, self.size = memory, key, 0

    def grow(self, size: int) -> None:
        if self._memory is not None:
            self._memory.count(self._key, size)
            self.size += size

    def shrink(self, to: int) -> None:
        """Hold no more than `to` bytes."""
        if to < self.size:
            self.grow(to - self.size)


def held_by(scope: Scope) -> Held:
    """What the request holds; of one that was not counted, nothing."""
    held: Held = scope["state"].get(HELD) or Held()
    return held


class AnswerMemoryEnds:
    """Pure ASGI: what a request holds is given back when it ends, however it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            held = scope.get("state", {}).pop(HELD, None)
            if held is not None:
                held.shrink(0)
