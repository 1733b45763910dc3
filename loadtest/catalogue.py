"""The adapters that the load asks for: names, their versions' digests, what each can answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Entry:
    """versions: number to digest; kinds: questions that every version can answer."""

    name: str
    versions: dict[int, str]
    kinds: frozenset[str]


@dataclass
class Catalogue:
    entries: dict[str, Entry] = field(default_factory=dict)
    _by_kind: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        return list(self.entries)

    def add(self, entry: Entry) -> None:
        self.entries[entry.name] = entry
        self._by_kind.clear()

    def names_of(self, kind: str) -> Sequence[str]:
        """Those that can answer a kind of question."""
        if kind not in self._by_kind:
            self._by_kind[kind] = [e.name for e in self.entries.values() if kind in e.kinds]
        return self._by_kind[kind]

    def versions(self, name: str) -> list[tuple[int, str]]:
        return list(self.entries[name].versions.items())

    def add_version(self, name: str, number: int, digest: str) -> None:
        self.entries[name].versions[number] = digest

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"name": e.name, "versions": list(e.versions.items()), "kinds": sorted(e.kinds)}
            for e in self.entries.values()
        ]

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> "Catalogue":
        catalogue = cls()
        for row in rows:
            versions = {int(number): digest for number, digest in row["versions"]}
            catalogue.add(Entry(row["name"], versions, frozenset(row["kinds"])))
        return catalogue
