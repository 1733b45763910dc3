"""Resolved: what references mean, remembered from one commit to the next."""

from collections.abc import Callable

from adapters.versions import Version

MOST = 16_384  # references


class Resolved:
    """Any thread asks; who commits calls `forget`.

    A commit replaces the memory, so that what is read before one is remembered by nobody after it.
    """

    def __init__(self, read: Callable[[str], Version]) -> None:
        self._read = read
        self._versions: dict[str, Version] = {}

    def version(self, reference: str) -> Version:
        """Raises as `read` does; that a reference means nothing is not remembered."""
        versions = self._versions  # taken before it is read
        version = versions.get(reference)
        if version is None:
            version = self._read(reference)
            if len(versions) >= MOST:
                versions.clear()
            versions[reference] = version
        return version

    def forget(self) -> None:
        self._versions = {}

    def __len__(self) -> int:
        return len(self._versions)
