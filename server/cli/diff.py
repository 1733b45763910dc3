"""trunkline adapters diff: where two versions differ, by what the server says they change."""

import re
from collections.abc import Sequence
from typing import Any

from adapters.errors import VersionNotFound
from adapters.names import CURRENT, Reference

KINDS = ("rank", "norm", "head", "labels", "metadata")


def version_of(answer: dict[str, Any], reference: Reference) -> dict[str, Any]:
    """The version of GET /adapters/{name} that a reference means. Raises VersionNotFound."""
    pointer = answer["aliases"].get(reference.alias or CURRENT, {})
    number = reference.version if reference.version is not None else pointer.get("version")
    found = [
        version
        for version in answer["versions"]
        if (
            version["digest"].startswith(reference.digest)
            if reference.digest
            else version["version"] == number
        )
    ]
    if len({version["digest"] for version in found}) > 1:
        raise VersionNotFound(f"{reference.name} has several versions of this digest prefix")
    if not found:
        raise VersionNotFound(f"{reference.name} has no such version, or none that is current")
    newest: dict[str, Any] = found[-1]
    return newest


def diff(
    names: tuple[str, str],
    versions: tuple[dict[str, Any], dict[str, Any]],
    weights: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Both sides by name, version and digest, their differences: kind, key, a, b; and `weights`,
    the places of GET /diff, layer by layer."""
    facts = [_facts(version) for version in versions]
    keys = sorted({*facts[0], *facts[1]}, key=_place)
    pairs = [(kind, key, *(side.get((kind, key)) for side in facts)) for kind, key in keys]
    sides = [
        {"name": name, "version": version["version"], "digest": version["digest"]}
        for name, version in zip(names, versions, strict=True)
    ]
    return {
        "a": sides[0],
        "b": sides[1],
        "differences": [
            {"kind": kind, "key": key, "a": a, "b": b} for kind, key, a, b in pairs if a != b
        ],
        "weights": sorted(weights, key=lambda place: _natural(place["key"])),
    }


def _place(key: tuple[str, str]) -> tuple[int, list[tuple[int, str]]]:
    """By kind, then by name."""
    return KINDS.index(key[0]), _natural(key[1])


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 comes behind layer 9."""
    return [(int(p) if p.isdecimal() else -1, p) for p in re.split(r"([0-9]+)", name)]


def _facts(version: dict[str, Any]) -> dict[tuple[str, str], Any]:
    applied = version["applied"]
    facts: dict[tuple[str, str], Any] = {
        ("rank", f"transformer.h.{layer}.{site}"): rank
        for layer, ranks in applied["lora"].items()
        for site, rank in ranks.items()
    }
    facts |= {("norm", norm): True for norm in applied["norms"]}
    heads = ("critic", "calibration", "classifier", "sequence_head", "cls_embedding")
    facts |= {("head", head): True for head in heads if applied.get(head)}
    if version["labels"]:
        facts["labels", ""] = ", ".join(version["labels"])
    metadata = {key: value for key, value in version["metadata"].items() if key != "labels"}
    return facts | {("metadata", key): value for key, value in metadata.items()}
