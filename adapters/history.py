"""History: what the registry keeps of deleted versions and of the audit, within bounds.

A version number is never given twice, and neither is a pointer's generation, whatever was dropped.
"""

import sqlite3
import zlib
from pathlib import Path

SCHEMA = (Path(__file__).parent / "history.sql").read_text("utf-8")

AUDIT_OF_NAME = 100  # audit rows kept of a name: as many as GET /adapters/{name} shows
TOMBSTONES_OF_NAME = 64  # deleted versions whose rows are kept
DELETED_NAMES = 512  # the last ones deleted, whose rows are kept
BUCKETS = 1024  # for the numbers of names deleted before those
BUCKETS_OF_NAMESPACE = 64  # the same of the names of one namespace
NAMESPACE_ROWS = 1 << 16  # of all namespaces; beyond, names are kept in the buckets for all


def bucket_of(name: str) -> int:
    return zlib.crc32(name.encode()) % BUCKETS


def namespace_bucket_of(name: str) -> tuple[str, int] | None:
    """None of a name without a namespace."""
    namespace, slash, rest = name.partition("/")
    return (namespace, zlib.crc32(rest.encode()) % BUCKETS_OF_NAMESPACE) if slash else None


def prepare(connection: sqlite3.Connection) -> None:
    """Fill the tables of this file in a registry that was written before they were there.

    Runs within a transaction, and changes nothing the second time.
    """
    if connection.execute("SELECT count(*) FROM floors").fetchone()[0] >= BUCKETS:
        return
    floors = ((bucket,) for bucket in range(BUCKETS))
    connection.executemany("INSERT OR IGNORE INTO floors VALUES (?, 0, 0)", floors)
    connection.execute(
        """INSERT OR IGNORE INTO deleted_names (name) SELECT name FROM versions GROUP BY name
        HAVING count(deleted_at) = count(*) ORDER BY max(deleted_at)"""
    )
    connection.execute(
        """INSERT OR IGNORE INTO folder_files SELECT name, json_extract(detail, '$.digest')
        FROM audit WHERE action = 'put' AND who LIKE 'file %'
        AND json_extract(detail, '$.digest') IS NOT NULL"""
    )
    for (name,) in connection.execute("SELECT DISTINCT name FROM versions").fetchall():
        _trim_name(connection, name)
        trim_audit(connection, name)
    _fold_oldest(connection)


def trim_audit(connection: sqlite3.Connection, name: str) -> None:
    """Keep the latest AUDIT_OF_NAME rows of the name."""
    connection.execute(
        """DELETE FROM audit WHERE name = ?1 AND id <= (SELECT id FROM audit WHERE name = ?1
        ORDER BY id DESC LIMIT 1 OFFSET ?2)""",
        (name, AUDIT_OF_NAME),
    )


def added(connection: sqlite3.Connection, name: str) -> None:
    """The name has a live version."""
    connection.execute("DELETE FROM deleted_names WHERE name = ?", (name,))


def removed(connection: sqlite3.Connection, name: str) -> None:
    """Versions of the name were deleted, perhaps all."""
    _trim_name(connection, name)
    if not _is_live(connection, name):
        connection.execute("INSERT OR IGNORE INTO deleted_names (name) VALUES (?)", (name,))
        _fold_oldest(connection)


def _is_live(connection: sqlite3.Connection, name: str) -> bool:
    live = "SELECT 1 FROM versions WHERE name = ? AND deleted_at IS NULL LIMIT 1"
    return connection.execute(live, (name,)).fetchone() is not None


def last_number(connection: sqlite3.Connection, name: str) -> int:
    """No number up to this one may be given to the name, as far as its own rows do not say so."""
    return _floor(connection, name)[0]


def last_generation(connection: sqlite3.Connection, name: str) -> int:
    """The same of its pointers' generations."""
    return _floor(connection, name)[1]


def _floor(connection: sqlite3.Connection, name: str) -> tuple[int, int]:
    number, generation = _row(
        connection, "SELECT number, generation FROM floors WHERE bucket = ?", bucket_of(name)
    )
    own = namespace_bucket_of(name)
    if own is None:
        return number, generation
    query = "SELECT number, generation FROM namespace_floors WHERE namespace = ? AND bucket = ?"
    own_number, own_generation = _row(connection, query, *own)
    return max(number, own_number), max(generation, own_generation)


def _row(connection: sqlite3.Connection, query: str, *values: object) -> tuple[int, int]:
    row = connection.execute(query, values).fetchone()
    return (row[0], row[1]) if row else (0, 0)


def _raise_floor(connection: sqlite3.Connection, name: str) -> None:
    """The name's rows are about to be dropped.

    A namespace has floors of its own: tenants would learn of each other by the numbers that their
    new names begin with.
    """
    values = """(SELECT coalesce(max(number), 0) FROM versions WHERE name = ?1),
        (SELECT coalesce(max(generation), 0) FROM pointers WHERE name = ?1)"""
    more = """SET number = max(number, excluded.number),
        generation = max(generation, excluded.generation)"""
    own = namespace_bucket_of(name)
    if own is not None and _has_room(connection, own):
        connection.execute(
            f"""INSERT INTO namespace_floors SELECT ?2, ?3, {values} WHERE true
            ON CONFLICT (namespace, bucket) DO UPDATE {more}""",
            (name, *own),
        )
    else:
        connection.execute(
            f"""INSERT INTO floors SELECT ?2, {values} WHERE true
            ON CONFLICT (bucket) DO UPDATE {more}""",
            (name, bucket_of(name)),
        )


def _has_room(connection: sqlite3.Connection, own: tuple[str, int]) -> bool:
    count: int = connection.execute("SELECT count(*) FROM namespace_floors").fetchone()[0]
    known = "SELECT 1 FROM namespace_floors WHERE namespace = ? AND bucket = ?"
    return count < NAMESPACE_ROWS or connection.execute(known, own).fetchone() is not None


def _trim_name(connection: sqlite3.Connection, name: str) -> None:
    """Drop its oldest deleted versions; that with the highest number stays in any case."""
    connection.execute(
        """DELETE FROM versions WHERE name = ?1 AND deleted_at IS NOT NULL
        AND number < (SELECT max(number) FROM versions WHERE name = ?1)
        AND number <= (SELECT number FROM versions WHERE name = ?1 AND deleted_at IS NOT NULL
        ORDER BY number DESC LIMIT 1 OFFSET ?2)""",
        (name, TOMBSTONES_OF_NAME),
    )


def _fold_oldest(connection: sqlite3.Connection) -> None:
    """Drop the rows of the names that were deleted before the last DELETED_NAMES."""
    oldest = connection.execute(
        "SELECT name FROM deleted_names ORDER BY id DESC LIMIT -1 OFFSET ?", (DELETED_NAMES,)
    ).fetchall()
    for (name,) in oldest:
        if _is_live(connection, name):  # uploaded by an older release, which has no such table
            added(connection, name)
            continue
        _raise_floor(connection, name)
        for table in ("versions", "pointers", "audit", "deleted_names"):
            connection.execute(f"DELETE FROM {table} WHERE name = ?", (name,))


def saw_file(connection: sqlite3.Connection, name: str, digest: str) -> None:
    """A file of the adapter folder is, or was, a version of the name."""
    connection.execute("INSERT OR IGNORE INTO folder_files VALUES (?, ?)", (name, digest))
