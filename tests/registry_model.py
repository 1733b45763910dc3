"""What the registry must say of one name: a model simple enough to be believed."""

from copy import deepcopy
from dataclasses import dataclass, field

CURRENT = "current"


@dataclass
class Name:
    versions: dict[int, str] = field(default_factory=dict)  # live ones: number -> digest
    pointers: dict[str, int] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    last: int = 0

    def put(self, digest: str, activate: bool = True) -> tuple[int, bool]:
        """The number of the version with these bytes, and whether it is new."""
        latest = max(self.versions, default=None)
        for number in (self.pointers.get(CURRENT), None if activate else latest):
            if number and self.versions[number] == digest:
                return number, False
        self.last += 1
        self.versions[self.last] = digest
        if activate:
            self.point(CURRENT, self.last)
        return self.last, True

    def point(self, alias: str, number: int) -> None:
        self.pointers[alias] = number
        self.generations[alias] = self.generations.get(alias, 0) + 1

    def drop(self, number: int) -> None:
        del self.versions[number]
        for alias in [alias for alias, at in self.pointers.items() if at == number]:
            del self.pointers[alias]
            self.generations[alias] += 1

    def drop_all(self) -> None:
        for number in list(self.versions):
            self.drop(number)

    def copy(self) -> "Name":
        return deepcopy(self)

    def visible(self) -> tuple[dict[int, str], dict[str, tuple[int, int]]]:
        """What a reader can see of it: versions, and pointers with their generations."""
        pointers = {alias: (at, self.generations[alias]) for alias, at in self.pointers.items()}
        return self.versions, pointers
