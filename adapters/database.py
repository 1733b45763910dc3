"""The registry's database: SQLite in WAL mode with synchronous=FULL, one writer at a time."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters.errors import ReadOnly, StorageFull


class Database:
    """One file, with a connection for each thread. What `writing` returned from is on the disk.

    Everything raises StorageFull or ReadOnly where the disk refuses.
    """

    def __init__(self, path: Path, schema: str) -> None:
        self._path = path
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._writing = threading.RLock()
        with _database_errors():
            self._connection().executescript(f"BEGIN IMMEDIATE; {schema} COMMIT;")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self._path, isolation_level=None, timeout=30, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: committed, and on the disk, when the block ends; or nothing of it."""
        with self._writing, _database_errors():
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query gives, within the transaction of this thread if it is in one."""
        with _database_errors():
            return self._connection().execute(query, values).fetchall()


@contextmanager
def _database_errors() -> Iterator[None]:
    """SQLite's refusals of the disk as StorageFull and ReadOnly."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise StorageFull("the disk is full; nothing was stored") from error
        raise ReadOnly(
            "the registry takes no writes; nothing was stored", retry_after_s=30
        ) from error
