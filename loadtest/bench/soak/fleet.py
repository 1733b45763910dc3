"""The adapters of a soak: which names live, which versions they have, what a name may mean."""

import asyncio
import hashlib
import itertools
import json
import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loadtest.adapter_file import AdapterMaker

SETS = 8  # of different weights; every file has bytes, and a digest, of its own
MEANINGS = 16  # digests kept of a name, to judge answers that are on their way
KEPT_VERSIONS = 3  # live versions of a name; older ones are deleted
# Names that live for the whole run and get half of the new versions: few, so that what is kept of
# their past is full within the warm-up.
STEADY = 4


@dataclass
class Meaning:
    """From when to when an answer under a name may come from a digest."""

    digest: str
    since: float  # its upload was sent
    until: float = float("inf")  # the answer to the next upload was there


@dataclass(eq=False)
class Name:
    name: str
    meanings: deque[Meaning] = field(default_factory=lambda: deque(maxlen=MEANINGS))
    versions: list[int] = field(default_factory=list)  # live ones, oldest first
    changing: bool = False  # an upload is under way
    _in_use: int = 0  # requests under way
    _unused: asyncio.Event = field(default_factory=asyncio.Event)

    def may_mean(self, digest: str, sent: float, received: float) -> bool:
        """Whether a request that was under way between these times may be answered so."""
        return any(
            m.digest == digest and m.since <= received and m.until >= sent for m in self.meanings
        )

    @contextmanager
    def used(self) -> Iterator[None]:
        """A request is under way."""
        self._in_use += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._in_use -= 1
            if not self._in_use:
                self._unused.set()

    async def until_unused(self) -> None:
        """No request is under way any more."""
        if self._in_use:
            await self._unused.wait()

    def sends(self, digest: str, sent: float) -> None:
        """An upload begins: answers may be of it before its own answer is there."""
        self.meanings.append(Meaning(digest, sent))

    def uploaded(self, digest: str, number: int, answered: float) -> None:
        """The upload was answered: what it replaces may not be meant by later requests."""
        for meaning in self.meanings:
            if meaning.digest != digest:
                meaning.until = min(meaning.until, answered)
        self.versions.append(number)


@dataclass(frozen=True)
class File:
    data: bytes
    digest: str
    weights: int  # which of the SETS


class Files:
    """Adapter files without end, made of few weight sets so that making one costs little."""

    def __init__(self, config: Mapping[str, Any], digest: str, rank: int) -> None:
        maker = AdapterMaker(config, digest, rank)
        self._parts = [_parts(maker.file(seed)) for seed in range(SETS)]
        self._number = itertools.count()
        self.rank = rank

    def next(self) -> File:
        number = next(self._number)
        weights = number % SETS
        header, data = self._parts[weights]
        metadata = header["__metadata__"] | {"number": str(number)}
        text = json.dumps(header | {"__metadata__": metadata}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = len(text).to_bytes(8, "little") + text + data
        return File(file, f"sha256:{hashlib.sha256(file).hexdigest()}", weights)


def _parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


class Fleet:
    """A constant number of live names: STEADY ones that stay, and others that are replaced."""

    def __init__(self, size: int, dice: random.Random) -> None:
        self.size, self._dice = max(size, STEADY + 1), dice
        self.steady: list[Name] = [Name(f"steady/name-{index}") for index in range(STEADY)]
        self.passing: deque[Name] = deque()  # the oldest first
        self._number = itertools.count()

    def new_name(self) -> Name:
        number = next(self._number)
        return Name(f"tenant-{number % 97}/soak-{number:06}")

    @property
    def live(self) -> int:
        return len(self.steady) + len(self.passing)

    def any(self) -> Name | None:
        """A live name that has a version; a steady one half of the time."""
        some = self.steady if self._dice.random() < 0.5 or not self.passing else self.passing
        name = some[self._dice.randrange(len(some))]
        return name if name.versions else None

    def to_change(self) -> Name | None:
        """A live name that no upload is under way for; a steady one half of the time."""
        some = self.steady if self._dice.random() < 0.5 else self.passing
        free = [name for name in some if not name.changing]
        return self._dice.choice(free) if free else None

    def oldest(self) -> Name | None:
        """The name to delete, taken out so that nobody asks for it; None while there are few."""
        if self.live <= self.size or not self.passing or self.passing[0].changing:
            return None
        return self.passing.popleft()
