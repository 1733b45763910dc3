"""The registry: durable names, immutable versions, pointers with generations.

SQLite in WAL mode with synchronous=FULL: what a method returned from is there after a power cut.
A name is resolved by one read; everything behind it is keyed by digest.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters import history
from adapters.conditions import UNCONDITIONAL, Condition
from adapters.database import Database
from adapters.errors import Damaged, NotFound, VersionNotFound
from adapters.listing import Wanted, matching, page_query
from adapters.mark import Mark, mark_of
from adapters.names import CURRENT, check_alias, check_name, parse_reference, what_is_missing
from adapters.resolved import Resolved
from adapters.store import Blob
from adapters.versions import Named, Pointer, Record, Version, parse_record

SCHEMA = (Path(__file__).parent / "schema.sql").read_text("utf-8")


_VERSION = """SELECT v.name, v.number, v.digest, b.bytes, v.created_at, b.record, b.damaged
    FROM versions v JOIN blobs b ON b.digest = v.digest WHERE v.deleted_at IS NULL"""

_LIVE = "SELECT digest FROM versions WHERE deleted_at IS NULL"


class Registry:
    """One file. Reads go through a connection of each thread's own, writes one at a time."""

    def __init__(self, path: Path, admit_write: Callable[[], None] = lambda: None) -> None:
        """`admit_write` raises where nothing may be written: the file is a copy then."""
        self.path = path
        self._database = Database(path, SCHEMA + history.SCHEMA, history.prepare, admit_write)
        self._resolved = Resolved(self.read)
        self.mark = Mark(mark_of(path), self.commits())

    def close(self) -> None:
        self._database.close()
        self.mark.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, as Database.writing; its commit is numbered, and the mark follows."""
        number = 0
        try:
            with self._database.writing() as connection:
                before = connection.total_changes
                yield connection
                if connection.total_changes != before:
                    number = self._next_commit(connection)
        finally:
            self._resolved.forget()
        self.mark.note(number)

    def commits(self) -> int:
        """How many transactions have changed this registry."""
        number: int = self._rows("SELECT number FROM commits")[0][0]
        return number

    def _next_commit(self, connection: sqlite3.Connection) -> int:
        connection.execute("UPDATE commits SET number = number + 1")
        return self.commits()

    def supersede(self) -> None:
        """Commit nothing but a number: what a failed commit left in the log can't come back."""
        with self.writing() as connection:
            connection.execute("UPDATE commits SET number = number")

    # Reading.

    def resolve(self, reference: str) -> Version:
        """The version a reference means now. Raises BadName, NotFound, VersionNotFound, Damaged.

        Not to be called within `writing`, whose own changes it does not see.
        """
        return self._resolved.version(reference)

    def read(self, reference: str) -> Version:
        """`resolve` from the file, as the transaction of this thread sees it."""
        parsed = parse_reference(reference)
        if parsed.version is not None:
            found = self._versions("AND v.name = ? AND v.number = ?", parsed.name, parsed.version)
        elif parsed.digest is not None:
            condition = "AND v.name = ? AND v.digest >= ? AND v.digest < ? ORDER BY v.number DESC"
            found = self._versions(condition, parsed.name, parsed.digest, parsed.digest + "g")
            if len({version.digest for version in found}) > 1:
                raise VersionNotFound(f"{parsed.name} has several versions of this digest prefix")
        else:
            condition = """AND v.name = ? AND v.number = (
                SELECT number FROM pointers WHERE name = v.name AND alias = ?)"""
            found = self._versions(condition, parsed.name, parsed.alias or CURRENT)
        if found and found[0].damaged:
            raise Damaged(f"the file of {found[0].name}@{found[0].number} is damaged")
        if found:
            return found[0]
        if not self.exists(parsed.name):
            raise NotFound(f"no adapter is named {parsed.name}")
        raise VersionNotFound(what_is_missing(parsed))

    def exists(self, name: str) -> bool:
        rows = self._rows(
            "SELECT 1 FROM versions WHERE name = ? AND deleted_at IS NULL LIMIT 1", name
        )
        return bool(rows)

    def knows(self, name: str, digest: str) -> bool:
        """Whether the digest is a version of the name, or was one that is remembered.

        Remembered are the last that were deleted, and every file that `saw_file` was told of.
        """
        query = "SELECT 1 FROM {} WHERE name = ? AND digest = ?"
        tables = ("versions", "folder_files")
        return any(self._rows(query.format(table), name, digest) for table in tables)

    def saw_file(self, name: str, digest: str) -> None:
        """Remember for good that a file of the adapter folder is or was a version of the name."""
        known = "SELECT 1 FROM folder_files WHERE name = ? AND digest = ?"
        if not self._rows(known, name, digest):
            with self.writing() as connection:
                history.saw_file(connection, name, digest)

    def named(self, name: str) -> Named:
        """Raises NotFound, and BadName, which does not repeat the name as NotFound does."""
        check_name(name)
        found = self.named_all([name])
        if not found:
            raise NotFound(f"no adapter is named {name}")
        return found[0]

    def page(
        self, after: str = "", limit: int = 100, patterns: Sequence[str] = ("*",)
    ) -> list[Named]:
        """Names in order, those behind `after` that a shell pattern matches, as fnmatch has it."""
        rows = self.rows_of_page(Wanted(after=after, limit=limit, patterns=patterns))
        return self.named_all([name for name, _ in rows])

    def rows_of_page(self, wanted: Wanted) -> list[tuple[str, float]]:
        """Names and their sort keys, in order; of a sort that is counted in memory all, with 0.

        Raises BadCursor.
        """
        query, values = page_query(wanted)
        return [(name, key) for name, key in self._rows(query, *values)]

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query of adapters/version_pages.py or adapters/pin_table.py gives."""
        return self._database.rows(query, *values)

    def count(self) -> int:
        rows = self._rows("SELECT count(DISTINCT name) FROM versions WHERE deleted_at IS NULL")
        count: int = rows[0][0]
        return count

    def creation_times(self, patterns: Sequence[str] = ("*",)) -> dict[str, float]:
        """When the oldest live version of each matching name was made; names in order.

        Other names are not read, so that the time it takes tells nothing of them.
        """
        matches, values = matching(patterns)
        query = f"""SELECT s.name, min(s.created_at) FROM versions s
            WHERE s.deleted_at IS NULL AND {matches} GROUP BY s.name ORDER BY s.name"""
        return dict(self._rows(query, *values))

    def blobs(self) -> dict[str, Blob]:
        """What the store must hold, by digest."""
        rows = self._rows("SELECT digest, bytes, mtime_ns FROM blobs")
        return {digest: Blob(digest, size, mtime) for digest, size, mtime in rows}

    def stored_bytes(self) -> int:
        total: int = self._rows("SELECT coalesce(sum(bytes), 0) FROM blobs")[0][0]
        return total

    def bytes_of(self, patterns: Sequence[str], but: str) -> int:
        """The bytes of the files that names of these patterns have, `but` for one digest's."""
        matches, values = matching(patterns)
        query = f"""SELECT coalesce(sum(bytes), 0) FROM blobs WHERE digest != ? AND digest IN
            (SELECT s.digest FROM versions s WHERE s.deleted_at IS NULL AND {matches})"""
        total: int = self._rows(query, but, *values)[0][0]
        return total

    def damaged(self) -> set[str]:
        return {row[0] for row in self._rows("SELECT digest FROM blobs WHERE damaged")}

    def unused(self) -> list[str]:
        """Digests that no live version names: deletes whose requests had not ended at the stop."""
        query = f"SELECT digest FROM blobs WHERE digest NOT IN ({_LIVE})"
        return [row[0] for row in self._rows(query)]

    def damaged_count(self) -> int:
        """How many stored files are known not to be what their digests say."""
        damaged: int = self._rows("SELECT count(*) FROM blobs WHERE damaged")[0][0]
        return damaged

    def audit(self, name: str, limit: int = 100) -> list[dict[str, Any]]:
        """Who did what to a name, the latest first."""
        rows = self._rows(
            "SELECT at, who, action, detail FROM audit WHERE name = ? ORDER BY id DESC LIMIT ?",
            name,
            limit,
        )
        return [
            {"at": at, "who": who, "action": action, "detail": json.loads(detail)}
            for at, who, action, detail in rows
        ]

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._database.rows(query, *values)

    def _versions(self, condition: str, *values: Any) -> list[Version]:
        return [
            Version(name, number, digest, size, created_at, parse_record(record), bool(damaged))
            for name, number, digest, size, created_at, record, damaged in self._rows(
                f"{_VERSION} {condition}", *values
            )
        ]

    def named_all(self, names: Sequence[str]) -> list[Named]:
        """Those of the names that exist, in this order."""
        marks = ", ".join("?" * len(names))
        versions: dict[str, list[Version]] = {}
        condition = f"AND v.name IN ({marks}) ORDER BY v.name, v.number"
        for version in self._versions(condition, *names):
            versions.setdefault(version.name, []).append(version)
        pointers: dict[str, list[Pointer]] = {}
        rows = self._rows(
            f"""SELECT name, alias, number, previous, generation FROM pointers
            WHERE name IN ({marks}) AND number IS NOT NULL ORDER BY alias""",
            *names,
        )
        for name, *rest in rows:
            pointers.setdefault(name, []).append(Pointer(*rest))
        return [Named(n, versions[n], pointers.get(n, [])) for n in names if n in versions]

    # Writing. Each is one transaction; what a condition forbids changes nothing.

    def check_condition(self, name: str, condition: Condition) -> None:
        """Raises Conflict unless the condition holds for the name; its tag is the current version.

        Within `writing` what it found stays so until the commit.
        """
        condition.check(name, self._current(name), self.exists(name))

    def add(
        self,
        connection: sqlite3.Connection,
        name: str,
        blob: Blob,
        record: Record,
        who: str,
        activate: bool = True,
    ) -> tuple[int, bool]:
        """The number of the version that has the blob's bytes, and whether it is new.

        The bytes of the current version, or of the latest where nothing is to be activated, make
        no new one. Runs within `writing`, so that a condition checked there still holds.
        """
        latest, last = self._latest(name)
        connection.execute(
            """INSERT INTO blobs (digest, bytes, mtime_ns, record) VALUES (?, ?, ?, ?)
            ON CONFLICT (digest) DO UPDATE SET bytes = excluded.bytes, damaged = 0,
            mtime_ns = excluded.mtime_ns, record = excluded.record""",
            (blob.digest, blob.bytes, blob.mtime_ns, record.to_json()),
        )
        for known in {self._current(name), None if activate else latest}:
            if known and self._digest(name, known) == blob.digest:
                return known, False
        number = max(last, history.last_number(connection, name)) + 1
        connection.execute(
            "INSERT INTO versions (name, number, digest, created_at) VALUES (?, ?, ?, ?)",
            (name, number, blob.digest, time.time()),
        )
        history.added(connection, name)
        if activate:
            self._move(connection, name, CURRENT, number)
        self._log(connection, who, "put", name, version=number, digest=blob.digest)
        return number, True

    def point(
        self,
        name: str,
        alias: str,
        number: int,
        who: str,
        condition: Condition = UNCONDITIONAL,
    ) -> Pointer:
        """Move an alias, or `current`, to a version. The tag is the pointer's generation, 0: new.

        Raises BadName, NotFound, VersionNotFound, or Conflict.
        """
        check_alias(alias)
        with self.writing() as connection:
            self.read(f"{name}@{number}")
            pointer = self._pointer(name, alias)
            exists = pointer.number is not None
            condition.check(f"{name}@{alias}", pointer.generation, exists)
            self._move(connection, name, alias, number)
            self._log(connection, who, "point", name, alias=alias, version=number)
            return self._pointer(name, alias)

    def remove(
        self, name: str, number: int | None, who: str, condition: Condition = UNCONDITIONAL
    ) -> list[Version]:
        """Tombstone a version, or all of a name; their pointers point to nothing.

        The condition's tag is the version's own number; of a whole name it is the current version.
        Returns the versions removed. Raises NotFound, VersionNotFound or Conflict.
        """
        with self.writing() as connection:
            versions = self.named(name).versions
            if number is not None:
                versions = [version for version in versions if version.number == number]
                if not versions:
                    raise VersionNotFound(f"{name} has no version {number}")
                condition.check(f"{name}@{number}", number, exists=True)
            else:
                self.check_condition(name, condition)
            numbers = [version.number for version in versions]
            self._tombstone(connection, name, numbers)
            for each in numbers[-history.AUDIT_OF_NAME :]:  # more rows would not be kept
                self._log(connection, who, "delete", name, version=each)
            history.removed(connection, name)
            return list(versions)

    def _tombstone(self, connection: sqlite3.Connection, name: str, numbers: list[int]) -> None:
        """A few statements whatever the count, since other writes wait for the transaction."""
        of_them = (name, json.dumps(numbers))
        connection.execute(
            """UPDATE versions SET deleted_at = ?3
            WHERE name = ?1 AND number IN (SELECT value FROM json_each(?2))""",
            (*of_them, time.time()),
        )
        connection.execute(
            """UPDATE pointers SET number = NULL, previous = NULL, generation = generation + 1
            WHERE name = ?1 AND number IN (SELECT value FROM json_each(?2))""",
            of_them,
        )
        connection.execute(
            """UPDATE pointers SET previous = NULL
            WHERE name = ?1 AND previous IN (SELECT value FROM json_each(?2))""",
            of_them,
        )

    def forget_blob(self, connection: sqlite3.Connection, digest: str) -> bool:
        """Drop a digest that no live version names; False where one does. Within `writing`."""
        live = self._rows(
            "SELECT 1 FROM versions WHERE digest = ? AND deleted_at IS NULL LIMIT 1", digest
        )
        if not live:
            connection.execute("DELETE FROM blobs WHERE digest = ?", (digest,))
        return not live

    def has_blob(self, digest: str) -> bool:
        return bool(self._rows("SELECT 1 FROM blobs WHERE digest = ?", digest))

    def set_damaged(self, digests: Iterable[str], damaged: bool = True) -> None:
        """Versions of a damaged file answer Damaged until a sound one is found in its place."""
        with self.writing() as connection:
            self.note_damage(connection, digests, damaged)

    def note_damage(
        self, connection: sqlite3.Connection, digests: Iterable[str], damaged: bool
    ) -> None:
        """`set_damaged` within `writing`."""
        for digest in digests:
            connection.execute(
                "UPDATE blobs SET damaged = ?1 WHERE digest = ?2 AND damaged != ?1",
                (int(damaged), digest),
            )

    def _current(self, name: str) -> int | None:
        return self._pointer(name, CURRENT).number

    def _pointer(self, name: str, alias: str) -> Pointer:
        rows = self._rows(
            """SELECT alias, number, previous, generation FROM pointers
            WHERE name = ? AND alias = ?""",
            name,
            alias,
        )
        return Pointer(*rows[0]) if rows else Pointer(alias, None, None, 0)

    def _latest(self, name: str) -> tuple[int, int]:
        """The latest live version's number and the last number ever given, 0 for none."""
        rows = self._rows(
            """SELECT coalesce(max(CASE WHEN deleted_at IS NULL THEN number END), 0),
            coalesce(max(number), 0) FROM versions WHERE name = ?""",
            name,
        )
        return rows[0][0], rows[0][1]

    def _digest(self, name: str, number: int) -> str | None:
        rows = self._rows("SELECT digest FROM versions WHERE name = ? AND number = ?", name, number)
        return rows[0][0] if rows else None

    def _move(self, connection: sqlite3.Connection, name: str, alias: str, number: int) -> None:
        connection.execute(
            """INSERT INTO pointers (name, alias, number, generation) VALUES (?, ?, ?, ?)
            ON CONFLICT (name, alias) DO UPDATE SET generation = generation + 1,
            previous = number, number = excluded.number""",
            (name, alias, number, history.last_generation(connection, name) + 1),
        )

    def _log(
        self, connection: sqlite3.Connection, who: str, action: str, name: str, **detail: Any
    ) -> None:
        connection.execute(
            "INSERT INTO audit (at, who, action, name, detail) VALUES (?, ?, ?, ?, ?)",
            (time.time(), who, action, name, json.dumps(detail)),
        )
        history.trim_audit(connection, name)

    # For tables that are kept elsewhere: adapters/pin_table.py.
    note = _log
