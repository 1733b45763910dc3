"""DrainRate: how fast the device works off what waits."""

HALF_LIFE_S = 4.0  # of time with work to do: what ran so long ago counts half


class DrainRate:
    """Tokens a second while there was work to do, lately.

    The device thread notes, anybody reads.
    """

    def __init__(self) -> None:
        self._sums = 0.0, 0.0  # tokens and seconds, each fading; replaced whole

    def note(self, tokens: int, seconds: float) -> None:
        """A batch is done."""
        keep = 0.5 ** (seconds / HALF_LIFE_S)
        before_tokens, before_s = self._sums
        self._sums = before_tokens * keep + tokens, before_s * keep + seconds

    @property
    def per_s(self) -> float:
        """0 while nothing has run yet."""
        tokens, seconds = self._sums
        return tokens / seconds if seconds else 0.0

    def seconds(self, tokens: float) -> float:
        """How long so many tokens take; 0 while nothing has run yet, and so is not known."""
        past_tokens, past_s = self._sums
        return tokens * past_s / past_tokens if past_tokens else 0.0
