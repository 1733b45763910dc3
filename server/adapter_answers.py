"""What the adapter routes answer: rows of the list, versions, where a version is."""

from dataclasses import asdict
from typing import Any

from adapters.library import Library
from adapters.validate import Manifest
from adapters.version_pages import Listed
from adapters.versions import Version
from server.answers import adapter_entry


def summary(listed: Listed, library: Library) -> dict[str, Any]:
    """One row of the list; digest, rank, bytes and created_at are the current version's."""
    usage = library.usage(listed.name)
    return {
        "name": listed.name,
        "version": listed.current,
        "aliases": {
            pointer.alias: {
                "version": pointer.number,
                "previous": pointer.previous,
                "generation": pointer.generation,
            }
            for pointer in listed.pointers
        },
        "versions": listed.numbers,
        "digest": listed.digest,
        "rank": listed.rank,
        "bytes": listed.bytes,
        "created_at": listed.created_at,
        "resident": library.residency.is_resident(listed.name, listed.shown, listed.digest),
        "in_flight": library.leases.of_name(listed.name),
        "requests": usage.requests,
        "last_used": usage.last_used,
    }


def version_entry(version: Version) -> dict[str, Any]:
    """What a version is, since its upload."""
    record = version.record
    return {
        "version": version.number,
        "digest": version.digest,
        "bytes": version.bytes,
        "created_at": version.created_at,
        "rank": version.manifest.rank,
        "probe_delta": record.probe_delta,
        "applied": _applied(version.manifest),
        "labels": list(version.manifest.labels),
        "metadata": dict(record.metadata),
        "damaged": version.damaged,
    }


def placed_version(version: Version, library: Library) -> dict[str, Any]:
    """version_entry, and where the version is now."""
    return version_entry(version) | _place(version, library)


def residency(version: Version, library: Library) -> dict[str, Any]:
    """Which version, and where it is now."""
    return (adapter_entry(version) or {}) | _place(version, library)


def _place(version: Version, library: Library) -> dict[str, Any]:
    return asdict(library.residency.place(version))


def _applied(manifest: Manifest) -> dict[str, Any]:
    """What is changed, and where: the rank by layer and site, LayerNorms, heads."""
    return {
        "lora": {str(layer): sites for layer, sites in manifest.ranks.items()},
        "norms": manifest.norms,
        "critic": manifest.critic,
        "calibration": manifest.calibration,
        "classifier": bool(manifest.labels),
        "sequence_head": manifest.sequence_head,
        "cls_embedding": manifest.cls_embedding,
    }
