"""Names and versions as lists show them: only records that are shown are read; pages are bounded.

A record may have a megabyte of metadata, so a list of names reads none, and a page of versions ends
after PAGE_BYTES of them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.names import CURRENT
from adapters.versions import Pointer, Version, parse_record

PAGE_BYTES = 8 << 20  # of the records of a page of versions
PAGE_NUMBERS = 50_000  # versions and aliases of a page of names

Rows = Callable[..., list[tuple[Any, ...]]]  # of a query and its values

_LIVE = "v.deleted_at IS NULL"
_WITH_BLOB = "FROM versions v JOIN blobs b ON b.digest = v.digest"


@dataclass(frozen=True)
class Listed:
    """A name in a list; the last four fields are of the current, else the latest version."""

    name: str
    numbers: Sequence[int]  # of its live versions
    pointers: Sequence[Pointer]
    current: int | None
    digest: str
    bytes: int
    created_at: float
    rank: int

    @property
    def shown(self) -> int:
        """The version that the last fields are of."""
        return self.numbers[-1] if self.current is None else self.current


def within_a_page(rows: Rows, names: Sequence[str]) -> list[str]:
    """The first of the names that have PAGE_NUMBERS versions and aliases; at least one of them."""
    left = PAGE_NUMBERS
    page: list[str] = []
    counts = _counts(rows, names)
    for name in names:
        left -= counts.get(name, 0)
        if page and left < 0:
            break
        page.append(name)
    return page


def _counts(rows: Rows, names: Sequence[str]) -> dict[str, int]:
    marks = ", ".join("?" * len(names))
    found = rows(
        f"""SELECT v.name, count(*) + (SELECT count(*) FROM pointers p WHERE p.name = v.name)
        FROM versions v WHERE v.name IN ({marks}) AND {_LIVE} GROUP BY v.name""",
        *names,
    )
    return dict(found)


def listed(rows: Rows, names: Sequence[str]) -> list[Listed]:
    """Those of the names that exist, in this order."""
    marks = ", ".join("?" * len(names))
    numbers: dict[str, list[int]] = {}
    for name, number in rows(
        f"""SELECT v.name, v.number FROM versions v
        WHERE v.name IN ({marks}) AND {_LIVE} ORDER BY v.name, v.number""",
        *names,
    ):
        numbers.setdefault(name, []).append(number)
    pointers: dict[str, list[Pointer]] = {}
    for name, *rest in rows(
        f"""SELECT name, alias, number, previous, generation FROM pointers
        WHERE name IN ({marks}) AND number IS NOT NULL ORDER BY alias""",
        *names,
    ):
        pointers.setdefault(name, []).append(Pointer(*rest))
    return [
        _listed(rows, name, numbers[name], pointers.get(name, []))
        for name in names
        if name in numbers
    ]


def _listed(rows: Rows, name: str, numbers: Sequence[int], pointers: Sequence[Pointer]) -> Listed:
    current = {pointer.alias: pointer.number for pointer in pointers}.get(CURRENT)
    shown = current if current in numbers else numbers[-1]
    ((digest, size, created_at, ranks),) = rows(
        f"""SELECT v.digest, b.bytes, v.created_at, json_extract(b.record, '$[0].ranks')
        {_WITH_BLOB} WHERE v.name = ? AND v.number = ?""",
        name,
        shown,
    )
    sites = json.loads(ranks).values()
    rank = max((rank for layer in sites for rank in layer.values()), default=0)
    number = current if current in numbers else None
    return Listed(name, numbers, pointers, number, digest, size, created_at, rank)


def version_page(
    rows: Rows, name: str, after: int, limit: int
) -> tuple[list[Version], int | None, int]:
    """Versions of a name above `after`, in order; the last one's number if there are more; bytes.

    The bytes are those of their records. At least one version is in a page.
    """
    sizes = rows(
        f"""SELECT v.number, length(CAST(b.record AS BLOB)) {_WITH_BLOB}
        WHERE v.name = ? AND v.number > ? AND {_LIVE} ORDER BY v.number LIMIT ?""",
        *(name, after, limit + 1),
    )
    last, total = after, 0
    for number, size in sizes[:limit]:
        if total and total + size > PAGE_BYTES:
            break
        last, total = number, total + size
    more = last if sizes and sizes[-1][0] > last else None
    return _versions(rows, name, after, last), more, total


def one_version(rows: Rows, name: str, number: int) -> Version | None:
    """A live version of the name, be its file damaged."""
    return next(iter(_versions(rows, name, number - 1, number)), None)


def _versions(rows: Rows, name: str, after: int, last: int) -> list[Version]:
    found = rows(
        f"""SELECT v.name, v.number, v.digest, b.bytes, v.created_at, b.record, b.damaged
        {_WITH_BLOB} WHERE v.name = ? AND v.number > ? AND v.number <= ? AND {_LIVE}
        ORDER BY v.number""",
        *(name, after, last),
    )
    return [
        Version(name, number, digest, size, created_at, parse_record(record), bool(damaged))
        for name, number, digest, size, created_at, record, damaged in found
    ]
