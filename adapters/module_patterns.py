"""PEFT's patterns of module names, matched in linear time.

The keys of rank_pattern and alpha_pattern are regular expressions that come with an upload, and
Python's own engine takes exponential time for some of them. This one (Thompson, 1968) walks all
states at once, so a pattern of n characters takes at most n steps for each character of a name;
and what names begin with is walked once for all of them.
It knows what such patterns are made of: characters, `.`, `\\d`, `\\w`, classes, groups, `|`, `*`,
`+`, `?`, `^` and `$`; anything else is refused.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MAX_LENGTH = 1000  # characters of one pattern, and of all patterns that are no plain names

_PLAIN = re.compile(r"[\w.]+", re.ASCII)
_CLASSES = {"d": re.compile("[0-9]"), "w": re.compile(r"\w", re.ASCII)}


class BadPattern(ValueError):
    """Not a pattern that is understood; the message says why."""


@dataclass(eq=False)
class _State:
    """Reads a character that `reads` takes and goes to `then`; without `reads` it goes to all."""

    then: "list[_State]" = field(default_factory=list)
    reads: Callable[[str], bool] | None = None


Fragment = tuple[_State, _State]  # where it begins and where it ends


class Patterns:
    """Values by pattern; the first pattern that matches the end of a module's name counts."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Raises BadPattern."""
        self._patterns: list[tuple[str, _Walk | None]] = []
        length = 0
        for pattern in patterns:
            if _PLAIN.fullmatch(pattern):
                self._patterns.append((pattern, None))
                continue
            length += len(pattern)
            if length > MAX_LENGTH:
                raise BadPattern(f"patterns may have {MAX_LENGTH} characters in all")
            walk = _Walk(_Parser(pattern).parse(), anchored=pattern.startswith("^"))
            self._patterns.append((pattern, walk))

    def match(self, module: str) -> str | None:
        """The first pattern that is all of the name, or its end from a dot on: PEFT's rule."""
        for pattern, walk in self._patterns:
            matches = _plain_matches(pattern, module) if walk is None else walk.accepts(module)
            if matches:
                return pattern
        return None


def _plain_matches(pattern: str, module: str) -> bool:
    """A plain name, in which a dot takes any character."""
    before = len(module) - len(pattern)
    if before < 0 or (before > 0 and module[before - 1] != "."):
        return False
    return all(p in (".", c) for p, c in zip(pattern, module[before:], strict=True))


class _Walk:
    """One pattern's states behind each beginning of a name, walked once for all names.

    Names of modules begin alike, and a pattern of many states takes a while for each character.
    """

    def __init__(self, fragment: Fragment, anchored: bool) -> None:
        self._end, self._anchored = fragment[1], anchored
        self._start = _closure([fragment[0]])
        self._behind: dict[str, list[_State]] = {"": self._start}

    def accepts(self, name: str) -> bool:
        """Whether the pattern is all of the name, or, unless it is anchored, its end from a dot."""
        known = next(n for n in range(len(name), -1, -1) if name[:n] in self._behind)
        for end in range(known + 1, len(name) + 1):
            self._behind[name[:end]] = self._step(self._behind[name[: end - 1]], name[end - 1])
        return any(state is self._end for state in self._behind[name])

    def _step(self, states: list[_State], character: str) -> list[_State]:
        then = [
            following
            for state in states
            if state.reads is not None and state.reads(character)
            for following in state.then
        ]
        return _closure(then + (self._start if character == "." and not self._anchored else []))


def _closure(states: Iterable[_State]) -> list[_State]:
    """The states, and all that are reached from them without a character."""
    seen: dict[int, _State] = {}
    pending = list(states)
    while pending:
        state = pending.pop()
        if id(state) not in seen:
            seen[id(state)] = state
            pending += [] if state.reads is not None else state.then
    return list(seen.values())


class _Parser:
    """alternatives := sequence ('|' sequence)*; sequence := (atom [*+?])*"""

    def __init__(self, pattern: str) -> None:
        self._text, self._at = pattern, 0

    def parse(self) -> Fragment:
        # PEFT puts the pattern before a `$`, so one of its own says nothing more
        if not self._text.endswith("\\$"):
            self._text = self._text.removesuffix("$")
        self._at = 1 if self._text.startswith("^") else 0
        fragment = self._alternatives(depth=0)
        if self._at and self._text.startswith("^") and len(fragment[0].then) > 1:
            raise BadPattern("it has alternatives behind an anchor: put them into a group")
        if self._at < len(self._text):
            raise BadPattern("a group is closed that was not opened")
        return fragment

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        if not self._next():
            raise BadPattern("it ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def _alternatives(self, depth: int) -> Fragment:
        if depth > 20:
            raise BadPattern("its groups are nested too deep")
        start, end = _State(), _State()
        while True:
            first, last = self._sequence(depth)
            start.then.append(first)
            last.then.append(end)
            if self._next() != "|":
                return start, end
            self._take()

    def _sequence(self, depth: int) -> Fragment:
        start = end = _State()
        while self._next() not in ("", "|", ")"):
            first, last = self._repeated(self._atom(depth))
            end.then.append(first)
            end = last
        return start, end

    def _repeated(self, atom: Fragment) -> Fragment:
        mark = self._next()
        if mark not in ("*", "+", "?") or not mark:
            return atom
        self._take()
        start, end = _State(), _State()
        start.then += [atom[0]] if mark == "+" else [atom[0], end]
        atom[1].then += [end] if mark == "?" else [atom[0], end]
        if self._next() in ("*", "+", "?", "{") and self._next():
            raise BadPattern("a repetition is repeated")
        return start, end

    def _atom(self, depth: int) -> Fragment:
        character = self._take()
        if character == "(":
            return self._group(depth)
        if character in "*+?{}^$":
            raise BadPattern("it has a repetition or an anchor where none is understood")
        if character == "[":
            return _reading(self._class())
        if character == "\\":
            return _reading(self._escaped())
        return _reading(lambda c: True) if character == "." else _reading(character.__eq__)

    def _group(self, depth: int) -> Fragment:
        if self._text.startswith("?:", self._at):
            self._at += 2
        elif self._next() == "?":
            raise BadPattern("it has a group of a kind that is not understood")
        group = self._alternatives(depth + 1)
        if self._take() != ")":
            raise BadPattern("a group is not closed")
        return group

    def _escaped(self) -> Callable[[str], bool]:
        character = self._take()
        if character in _CLASSES:
            return lambda c: _CLASSES[character].fullmatch(c) is not None
        if character.isalnum():
            raise BadPattern("it has an escape that is not understood")
        return character.__eq__

    def _class(self) -> Callable[[str], bool]:
        """[abc], [0-9], [^a-z]"""
        negated = self._next() == "^"
        self._at += negated
        found: list[tuple[str, str]] = []
        while not found or self._next() != "]":
            low = high = self._take()
            if low in "\\[":
                raise BadPattern("it has a class that is not understood")
            if self._next() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._take()
                high = self._take()
            found.append((low, high))
        self._take()
        return lambda c: negated != any(low <= c <= high for low, high in found)


def _reading(reads: Callable[[str], bool]) -> Fragment:
    start, end = _State(reads=reads), _State()
    start.then.append(end)
    return start, end
