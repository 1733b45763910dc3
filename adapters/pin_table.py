"""PinTable: the registry's table of pins, and its migration from folders that pinned by digest."""

import json
import logging
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import TrunklineError
from adapters.registry import Registry
from adapters.versions import Version

log = logging.getLogger("trunkline.adapters")

SCHEMA = (Path(__file__).parent / "pins.sql").read_text("utf-8")


@dataclass(frozen=True)
class PinRow:
    name: str
    number: int
    key: str  # id of the API key that asked for it, "" without keys
    at: float  # seconds since 1970


class PinTable:
    """Durable pins. A registry without the table gets it, with the pins that it had by digest."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        try:
            self._migrate()
        except TrunklineError as error:
            log.warning("pins can't be changed, since the registry takes no writes: %s", error)

    def rows(self) -> list[PinRow]:
        """Every pin, the oldest first."""
        if not self._exists():
            return [PinRow(name, number, "", 0.0) for name, number in self._pinned_by_digest()]
        rows = self._registry.rows("SELECT name, number, key, at FROM pins ORDER BY at, name")
        return [PinRow(*row) for row in rows]

    def add(self, version: Version, key: str, who: str) -> PinRow:
        """Raises VersionNotFound where the version was deleted meanwhile, ReadOnly, StorageFull."""
        with self._registry.writing() as connection:
            self._registry.read(f"{version.name}@{version.number}")
            row = PinRow(version.name, version.number, key, time.time())
            _insert(connection, row)
            self._registry.note(connection, who, "pin", version.name, digest=version.digest)
        return row

    def remove(self, version: Version, who: str) -> None:
        """Raises ReadOnly, StorageFull."""
        with self._registry.writing() as connection:
            connection.execute(
                "DELETE FROM pins WHERE name = ? AND number = ?", (version.name, version.number)
            )
            self._registry.note(connection, who, "unpin", version.name, digest=version.digest)

    def _exists(self) -> bool:
        query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'pins'"
        return bool(self._registry.rows(query))

    def _migrate(self) -> None:
        if self._exists():
            return
        with self._registry.writing() as connection:
            for statement in _statements(SCHEMA):
                connection.execute(statement)
            for name, number in self._pinned_by_digest():
                _insert(connection, PinRow(name, number, "", time.time()))

    def _pinned_by_digest(self) -> list[tuple[str, int]]:
        """The version that each pinned digest was pinned as: by the audit, else the first one."""
        digests = self._registry.rows("SELECT digest FROM blobs WHERE pinned")
        found = [self._pinned_as(digest) for (digest,) in digests]
        return [version for version in found if version is not None]

    def _pinned_as(self, digest: str) -> tuple[str, int] | None:
        versions = self._registry.rows(
            """SELECT name, max(number) FROM versions WHERE digest = ? AND deleted_at IS NULL
            GROUP BY name ORDER BY name""",
            digest,
        )
        asked = self._registry.rows(
            """SELECT name, detail FROM audit WHERE action = 'pin' AND name IN
            (SELECT name FROM versions WHERE digest = ?) ORDER BY id DESC""",
            digest,
        )
        names = [name for name, detail in asked if json.loads(detail).get("digest") == digest]
        numbers = dict(versions)
        name = next((name for name in [*names, *numbers] if name in numbers), None)
        return None if name is None else (name, numbers[name])


def _insert(connection: sqlite3.Connection, row: PinRow) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO pins (name, number, key, at) VALUES (?, ?, ?, ?)",
        (row.name, row.number, row.key, row.at),
    )


def _statements(script: str) -> list[str]:
    """The statements of a script; a trigger's own statements stay within it."""
    statements, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            statements.append(part)
            part = ""
    return statements
