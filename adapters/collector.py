"""Collector: the only code that unlinks a published file."""

from collections.abc import Callable

from adapters.registry import Registry
from adapters.store import BlobStore, Incoming


class Collector:
    """Unlinks within the write transaction that proves that no row names the file.

    `in_use` says how many requests hold a digest.
    """

    def __init__(self, registry: Registry, store: BlobStore, in_use: Callable[[str], int]) -> None:
        self._registry, self._store, self._in_use = registry, store, in_use

    def collect(self, digest: str) -> bool:
        """Drop row and file of a digest that no live version names and no request uses.

        Returns False, and changes nothing, for any other. Raises ReadOnly or StorageFull.
        """
        return self._unlink_unnamed(digest, forget=True)

    def take_back(self, incoming: Incoming) -> None:
        """After a failed publish: remove the name in the store that it may have been given.

        Raises ReadOnly or StorageFull; the upload's own name then has to stay.
        """
        # A commit that failed may be in the log as a whole, and a stop would bring it back.
        self._registry.supersede()
        self._unlink_unnamed(incoming.digest, forget=False)

    def _unlink_unnamed(self, digest: str, *, forget: bool) -> bool:
        with self._registry.writing() as connection:
            if forget and not self._in_use(digest):
                self._registry.forget_blob(connection, digest)
            if self._registry.has_blob(digest):
                return False
            # Before the commit: a stop in between leaves a row without a file, which the next start
            # drops. A file without a row would look as if the registry had lost one.
            self._store.unlink(digest)
            return True
