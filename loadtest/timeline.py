"""What a bare adapter name means while it is being moved, and whether an answer's digest fits."""

import math
from collections import deque
from dataclasses import dataclass, field


@dataclass
class Span:
    """`digest` may have been current from `begins` to `ends`, in seconds of the wall clock."""

    digest: str
    begins: float
    ends: float = math.inf


class Timeline:
    """Which digests a name may have been answered by, and when.

    A move makes the new digest possible from the moment it is asked for, and the old ones
    impossible from the moment it is answered. slack_s: how far machines' clocks may be apart.
    """

    def __init__(self, slack_s: float = 0.0) -> None:
        self.slack_s = slack_s
        self._spans: dict[str, list[Span]] = {}

    def start(self, name: str, digest: str) -> None:
        """What is current before the load begins."""
        self._spans[name] = [Span(digest, -math.inf)]

    def asked(self, name: str, digest: str, at: float) -> None:
        """A move to `digest` is about to be sent."""
        self._spans.setdefault(name, []).append(Span(digest, at))

    def answered(self, name: str, digest: str, at: float) -> None:
        """The move was answered. One that failed is never answered: both stay possible."""
        spans = self._spans[name]
        newest = max(i for i, span in enumerate(spans) if span.digest == digest)
        for span in spans[:newest]:
            span.ends = min(span.ends, at)

    def allows(self, name: str, digest: str, sent: float, received: float) -> bool:
        return any(
            span.digest == digest
            and sent <= span.ends + self.slack_s
            and received >= span.begins - self.slack_s
            for span in self._spans.get(name, ())
        )


@dataclass
class Judge:
    """Judges answers to bare names `settle_s` after they came: news of moves may be on its way."""

    timeline: Timeline
    settle_s: float = 0.0
    wrong: int = 0
    _waiting: deque[tuple[float, str, str, float]] = field(default_factory=deque)

    def note(self, name: str, digest: str, sent: float, received: float) -> None:
        self._waiting.append((received, name, digest, sent))

    def hand_over(self) -> list[tuple[float, str, str, float]]:
        """What is not judged yet, as (received, name, digest, sent), for another judge."""
        waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def settle(self, now: float) -> list[str]:
        """Sentences for the wrong ones among those that are due."""
        faults = []
        while self._waiting and self._waiting[0][0] + self.settle_s <= now:
            received, name, digest, sent = self._waiting.popleft()
            if not self.timeline.allows(name, digest, sent, received):
                faults.append(f"{name} was answered by {digest[:19]}, which it did not mean then")
        self.wrong += len(faults)
        return faults
