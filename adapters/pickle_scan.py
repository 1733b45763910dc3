"""Pickles looked through before they are read: nothing in one may cost more than its bytes do.

Unpickling runs no code of the file here (`pickles.py`), but a few crafted bytes could still have
the unpickler allocate gigabytes, or nest tuples so deeply that hashing one overflows the stack.
"""

import pickletools
from collections.abc import Sequence
from typing import Protocol

MAX_OPCODES = 1_000_000  # a vocabulary of 50,000 entries takes about 400,000
MAX_DEPTH = 100  # of containers within containers
MAX_DIGITS = 300  # of an integer

DAMAGED = "it is damaged"
_GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"}


class Immodest(ValueError):
    """The pickle is broken, or would take more memory or time than its size justifies."""


class Readable(Protocol):
    def read(self, size: int) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


class Bytes:
    """A file over bytes that never makes room for more than is there."""

    def __init__(self, data: memoryview, at: int = 0) -> None:
        self._data, self._at = data, at

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size < 0 else min(len(self._data), self._at + size)
        piece = bytes(self._data[self._at : end])
        self._at = end
        return piece

    def readline(self) -> bytes:
        """At most LINE bytes: no line of a pickle that is taken is longer."""
        piece = bytes(self._data[self._at : self._at + LINE])
        piece = piece[: piece.find(b"\n") + 1]
        self._at += len(piece)
        return piece

    def tell(self) -> int:
        return self._at


LINE = 4096


def scan(file: Readable) -> int:
    """Read one pickle's opcodes, and return where it ends. Raises Immodest.

    A stack of nesting depths is kept as the unpickler keeps its stack of values. A container that
    grows after it was put into another is counted with the depth it had then; tuples can't grow, so
    theirs is exact.
    """
    depths = _Depths()
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
            if count >= MAX_OPCODES:
                raise Immodest(f"it has more than {MAX_OPCODES:,} parts")
            depths.take(opcode, arg, count)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise error if isinstance(error, Immodest) else Immodest(DAMAGED) from error
    return file.tell()


class _Depths:
    def __init__(self) -> None:
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}

    def take(self, opcode: pickletools.OpcodeInfo, arg: object, count: int) -> None:
        name = opcode.name
        if isinstance(arg, int) and abs(arg) >= 10**MAX_DIGITS:
            raise Immodest(f"it has an integer of more than {MAX_DIGITS} digits")
        if name == "MARK":
            self._marks.append(len(self._stack))
        elif name == "POP" and self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        elif name == "DUP":
            self._stack.append(self._stack[-1])
        elif name.endswith("GET"):
            self._stack.append(self._memo[int(str(arg))])
        elif name == "MEMOIZE" or name.endswith("PUT"):
            self._remember(len(self._memo) if name == "MEMOIZE" else int(str(arg)), count)
        else:
            self._apply(opcode)

    def _remember(self, index: int, count: int) -> None:
        """The unpickler's memo is an array as long as its highest index."""
        if index > count:
            raise Immodest("it has a memo index beyond its parts")
        self._memo[index] = self._stack[-1]

    def _apply(self, opcode: pickletools.OpcodeInfo) -> None:
        taken = self._pop(opcode.stack_before)
        depth = 1 + max(taken) if taken else 0
        if opcode.name in _GROWING:
            depth = max(taken[0], 1 + max(taken[1:], default=-1))
        if depth > MAX_DEPTH:
            raise Immodest(f"it is nested deeper than {MAX_DEPTH} levels")
        self._stack += [depth] * len(opcode.stack_after)

    def _pop(self, before: Sequence[pickletools.StackObject]) -> list[int]:
        if pickletools.markobject in before:
            size = before.index(pickletools.markobject)
            base = self._marks.pop() - size
        else:
            base = len(self._stack) - len(before)
        if base < 0:
            raise Immodest(DAMAGED)
        taken = self._stack[base:]
        del self._stack[base:]
        return taken
