"""Which adapter a reference means: names to immutable versions, each known by its digest."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.errors import Invalid, NotFound, VersionNotFound
from adapters.format import read_adapter
from adapters.names import Reference, check_name, parse_reference
from adapters.slots import weights_of
from adapters.validate import Manifest, validate
from model.checkpoint import Backbone
from model.lora import AdapterWeights


@dataclass(frozen=True)
class Version:
    """One immutable version of one name."""

    name: str
    number: int
    digest: str  # sha256:<64 hex> of its file
    manifest: Manifest
    bytes: int
    created_at: float  # seconds since 1970


class FolderRegistry:
    """The adapter files of one folder, read at start; every name has the one version 1."""

    def __init__(
        self, folder: Path | None, backbone: Backbone, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._versions: dict[str, Version] = {}
        self._weights: dict[str, AdapterWeights] = {}
        for path in sorted(folder.rglob("*.safetensors")) if folder else ():
            assert folder is not None
            name = path.relative_to(folder).with_suffix("").as_posix()
            check_name(name)
            try:
                adapter = read_adapter(path)
                manifest = validate(adapter, backbone.config, backbone.digest, dtype)
            except Invalid as error:
                raise Invalid(error.details["reason"], f"{path}: {error.message}") from error
            stat = path.stat()
            self._versions[name] = Version(
                name, 1, adapter.digest, manifest, stat.st_size, stat.st_mtime
            )
            self._weights[adapter.digest] = weights_of(
                adapter, backbone.config, dtype, lambda t, d: t.to(device, d).contiguous()
            )

    def __iter__(self) -> Iterator[Version]:
        return iter(self._versions.values())

    def resolve(self, reference: str) -> Version:
        """Raises BadName, NotFound or VersionNotFound."""
        parsed = parse_reference(reference)
        version = self._versions.get(parsed.name)
        if version is None:
            raise NotFound(f"no adapter is named {parsed.name}")
        if not _names(parsed, version):
            raise VersionNotFound(f"{parsed.name} has no such version")
        return version

    def weights(self, digest: str) -> AdapterWeights:
        return self._weights[digest]


def _names(reference: Reference, version: Version) -> bool:
    if reference.alias is not None:
        return False
    if reference.version is not None:
        return reference.version == version.number
    return version.digest.startswith(reference.digest or "")
