"""How much load there is at which time: ramp, steps to the knee, soak, spike."""

from dataclasses import dataclass
from typing import Literal, get_args

ProfileName = Literal["ramp", "steps", "soak", "spike"]
PROFILES: tuple[str, ...] = get_args(ProfileName)
SPIKE = (0.4, 0.6)  # the part of the time in which a spike lasts
BEFORE_SPIKE = 0.2  # of the peak


@dataclass(frozen=True)
class Plateau:
    """Seconds from the beginning, and the level between them."""

    begins: float
    ends: float
    level: float


@dataclass(frozen=True)
class Profile:
    """A level over time: users in a closed loop, requests a second in an open one."""

    name: str
    peak: float
    seconds: float
    steps: int = 6

    def level(self, at: float) -> float | None:
        """None when it is over."""
        if at >= self.seconds:
            return None
        if self.name == "ramp":
            return self.peak * at / self.seconds
        return next(p.level for p in self.plateaus() if at < p.ends)

    def plateaus(self) -> list[Plateau]:
        """Where the level stays; a ramp is cut into `steps` parts, each with its middle level."""
        if self.name == "soak":
            return [Plateau(0.0, self.seconds, self.peak)]
        if self.name == "spike":
            start, end = (part * self.seconds for part in SPIKE)
            low = self.peak * BEFORE_SPIKE
            return [
                Plateau(0.0, start, low),
                Plateau(start, end, self.peak),
                Plateau(end, self.seconds, low),
            ]
        middle = 0.5 if self.name == "ramp" else 0.0
        width = self.seconds / self.steps
        return [
            Plateau(i * width, (i + 1) * width, self.peak * (i + 1 - middle) / self.steps)
            for i in range(self.steps)
        ]
