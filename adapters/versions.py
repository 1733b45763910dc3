"""What the registry knows: versions and what each changes, pointers, names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters.names import CURRENT
from adapters.record_cache import RecordCache
from adapters.validate import Manifest


@dataclass(frozen=True)
class Record:
    """What is known of a digest since its upload."""

    manifest: Manifest
    metadata: Mapping[str, str]
    probe_delta: float  # norm of the probe's change over the norm of the base's states

    def to_json(self) -> str:
        manifest = self.manifest.to_dict()
        return json.dumps([manifest, dict(self.metadata), self.probe_delta], sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        manifest, metadata, probe_delta = json.loads(text)
        return cls(Manifest.from_dict(manifest), metadata, probe_delta)


@dataclass(frozen=True)
class Version:
    """One immutable version of one name."""

    name: str
    number: int
    digest: str  # sha256:<64 hex> of its file
    bytes: int
    created_at: float  # seconds since 1970
    record: Record
    damaged: bool = False  # its file was put away; uploading the same bytes again mends it

    @property
    def manifest(self) -> Manifest:
        return self.record.manifest


@dataclass(frozen=True)
class Pointer:
    alias: str
    number: int | None
    previous: int | None
    generation: int


@dataclass(frozen=True)
class Named:
    """A name with its live versions, oldest first, and its pointers."""

    name: str
    versions: Sequence[Version]
    pointers: Sequence[Pointer]

    @property
    def current(self) -> Version | None:
        at = {pointer.alias: pointer.number for pointer in self.pointers}.get(CURRENT)
        return next((version for version in self.versions if version.number == at), None)


# Record.from_json, remembered: the record of a digest never changes. A parsed one takes a few times
# its text, which may have a megabyte of labels.
MOST_CHARACTERS = 16 << 20
parse_record = RecordCache(Record.from_json, MOST_CHARACTERS)
