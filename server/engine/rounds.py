"""Rounds: the order of turns in a round robin, in which newcomers go first."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Member = TypeVar("Member")


class Rounds(Generic[Name, Member]):
    """The members of one level of the queue, in the order of their turns.

    All new members come before all that had a turn (the new and old flows of RFC 8290). A member
    that runs empty stays until its turn would come, so that it is not new again before that: the
    caller drops an empty member when `first` returns it, by not giving it back.
    """

    def __init__(self) -> None:
        self._new: OrderedDict[Name, Member] = OrderedDict()
        self._old: OrderedDict[Name, Member] = OrderedDict()

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def __iter__(self) -> Iterator[Member]:
        yield from self._new.values()
        yield from self._old.values()

    def get(self, name: Name) -> Member | None:
        found = self._old.get(name)
        return found if found is not None else self._new.get(name)

    def add(self, name: Name, member: Member) -> None:
        """As the last of the new ones."""
        self._new[name] = member

    def first(self) -> tuple[Name, Member, bool]:
        """Takes out the member whose turn it is; with it whether it is new."""
        is_new = bool(self._new)
        name, member = (self._new or self._old).popitem(last=False)
        return name, member, is_new

    def end_turn(self, name: Name, member: Member) -> None:
        """Its next turn comes after those of all others."""
        self._old[name] = member

    def put_back(self, members: Sequence[tuple[Name, Member, bool]]) -> None:
        """Members from `first` whose turn is not over, in the order in which they were taken."""
        for name, member, is_new in reversed(members):
            those = self._new if is_new else self._old
            those[name] = member
            those.move_to_end(name, last=False)

    def put_last(self, name: Name, member: Member, is_new: bool) -> None:
        """A member from `first` whose turn comes after those of all others that are new or old."""
        (self._new if is_new else self._old)[name] = member
