"""Lists of adapters: a page of names by a sort key, and the cursor that goes on behind it.

A page goes on behind the pair (key, name) of its last row, so adapters that come or go meanwhile
shift nothing. `requests` and `used` are counted in memory and change under load: an adapter whose
count passes the cursor between two pages can be missed or seen twice, as in any such list.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapters.errors import TrunklineError

Sort = Literal["name", "created", "used", "requests", "bytes"]
SORTS: tuple[Sort, ...] = ("name", "created", "used", "requests", "bytes")

# Where a page begins: a sort key's value, and the name that tells equal values apart
Place = tuple[float, str]
_MARK = "~"  # no name begins with it, and no client can take a cursor for one


class BadCursor(TrunklineError):
    code = "validation_error"


@dataclass(frozen=True)
class Wanted:
    """Which names, in which order. `q` is a part of a name or of an alias."""

    sort: Sort = "name"
    descending: bool = False
    q: str = ""
    patterns: Sequence[str] = ("*",)  # the names a key may see, as fnmatch has them
    limit: int = 100
    after: str = ""  # a cursor; with the sort by name the last name itself

    def place(self) -> Place | None:
        """What `after` says; None at the beginning. Raises BadCursor. Not of the sort by name."""
        if not self.after:
            return None
        fields = _decoded(self.after)
        if fields is None or fields[:2] != [self.sort, self.descending]:
            raise BadCursor("after is not a cursor of a list with this sort and order")
        return fields[2], fields[3]

    def cursor(self, value: float, name: str) -> str:
        """The cursor behind this row."""
        if self.sort == "name":
            return name
        raw = json.dumps([self.sort, self.descending, value, name], separators=(",", ":"))
        return _MARK + base64.urlsafe_b64encode(raw.encode()).decode()


def _decoded(after: str) -> list[Any] | None:
    """Sort, order, value and name of a cursor; None for any other text."""
    try:
        raw = base64.urlsafe_b64decode(after.removeprefix(_MARK).encode("ascii"))
        fields = json.loads(raw)
        json.dumps(fields, ensure_ascii=False).encode("utf-8")  # no lone surrogate is in it
    except (ValueError, RecursionError):
        return None
    if not after.startswith(_MARK) or not isinstance(fields, list) or len(fields) != 4:
        return None
    value, name = fields[2:]
    proper = type(value) in (int, float) and abs(value) < 1e18 and isinstance(name, str)
    return fields if proper else None


# The version that a row of the list shows: the current one, else the latest.
_SHOWN = """WITH shown AS (
    SELECT v.name AS name, coalesce(p.number, max(v.number)) AS number
    FROM versions v LEFT JOIN pointers p ON p.name = v.name AND p.alias = 'current'
    WHERE v.deleted_at IS NULL GROUP BY v.name)
    SELECT s.name, {key} FROM shown s
    JOIN versions v ON v.name = s.name AND v.number = s.number
    JOIN blobs b ON b.digest = v.digest
    WHERE {where} ORDER BY 2 {order}, 1 {order} {limit}"""
# Names alone: a walk along the index, which ends with the page
_NAMES = """SELECT DISTINCT s.name, {key} FROM versions s
    WHERE s.deleted_at IS NULL AND {where} ORDER BY 1 {order} {limit}"""
_KEYS: dict[Sort, str] = {"created": "v.created_at", "bytes": "b.bytes"}


def matching(patterns: Sequence[str]) -> tuple[str, list[object]]:
    """The SQL, and its values, of the condition that s.name matches one of these patterns."""
    globs: list[object] = [pattern.replace("[!", "[^") for pattern in patterns]
    return f"({' OR '.join(['s.name GLOB ?'] * len(globs))})", globs


def page_query(wanted: Wanted) -> tuple[str, list[object]]:
    """The SQL, and its values, of the rows (name, key) of a page; for the counted sorts, of all.

    The key of the sort by name is 0.
    """
    matches, values = matching(wanted.patterns)
    conditions = [matches]
    if wanted.q:
        conditions.append(
            """(instr(s.name, ?) OR EXISTS (SELECT 1 FROM pointers a WHERE a.name = s.name
            AND a.number IS NOT NULL AND a.alias != 'current' AND instr(a.alias, ?)))"""
        )
        values += [wanted.q.lower()] * 2
    compare = "<" if wanted.descending else ">"
    key, limit = _KEYS.get(wanted.sort, "0"), "LIMIT ?"
    if wanted.sort == "name" and wanted.after:
        conditions.append(f"s.name {compare} ?")
        values.append(wanted.after)
    elif wanted.sort in _KEYS and (place := wanted.place()) is not None:
        conditions.append(f"({key}, s.name) {compare} (?, ?)")
        values += place
    elif wanted.sort in ("used", "requests"):
        limit = ""
    order = "DESC" if wanted.descending else "ASC"
    where = " AND ".join(conditions)
    form = _SHOWN if wanted.sort in _KEYS else _NAMES
    query = form.format(key=key, where=where, order=order, limit=limit)
    return query, values + ([wanted.limit] if limit else [])


def page_by_count(
    names: Sequence[str], counts: Mapping[str, float], wanted: Wanted
) -> list[tuple[str, float]]:
    """The page of a sort that is counted in memory, as page_query's rows; absent counts are 0."""
    place = wanted.place()
    keys = sorted(((counts.get(name, 0), name) for name in names), reverse=wanted.descending)
    if place is not None:
        keys = [key for key in keys if (key < place if wanted.descending else key > place)]
    return [(name, value) for value, name in keys[: wanted.limit]]
