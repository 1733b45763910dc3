"""The registry's database: SQLite in WAL mode with synchronous=FULL, one writer at a time."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters.storage_errors import reading_registry, writing_registry


class Database:
    """One file, with a connection for each thread. What `writing` returned from is on the disk.

    Reads raise Unreadable where the disk refuses; writes StorageFull, ReadOnly or Unwritten.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        prepare: Callable[[sqlite3.Connection], None],
        admit_write: Callable[[], None],
    ) -> None:
        """`prepare` completes a file of an older release, in the transaction of the schema. Both
        run where `admit_write` raises too: the file is a copy then.
        """
        self._path = path
        self._admit_write = admit_write
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._writing = threading.RLock()
        with writing_registry(path.parent):
            try:
                self._begin(schema, prepare)
            except BaseException:
                self.close()  # an open transaction would lock out who tries again
                raise

    def _begin(self, schema: str, prepare: Callable[[sqlite3.Connection], None]) -> None:
        connection = self._connection()
        connection.executescript(f"BEGIN IMMEDIATE; {schema}")
        prepare(connection)
        connection.execute("COMMIT")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self._path, isolation_level=None, timeout=30, check_same_thread=False
            )
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
            except BaseException:
                connection.close()
                raise
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: committed, and on the disk, when the block ends; or nothing of it."""
        self._admit_write()
        with self._writing, writing_registry(self._path.parent), self._transaction() as connection:
            yield connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            self._roll_back(connection)
            raise

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        """Where the disk refuses even that, a new connection takes its place."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._connections.remove(connection)
            self._local.connection = None
            connection.close()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query gives, within the transaction of this thread if it is in one."""
        with reading_registry():
            return self._connection().execute(query, values).fetchall()
