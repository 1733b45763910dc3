"""/adapters: upload, list, promote, load, pin, delete."""

import asyncio
import re
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from adapters.library import Library, Upload
from adapters.names import check_name
from adapters.validate import Manifest
from adapters.versions import Named, Version
from server.answers import JSONAnswer, adapter_entry
from server.bodies import read_json
from server.engine.errors import BadInput, Draining
from server.guard import caller_of, check_adapter
from server.routes.documented import BODY, IN_USE, READ, UPLOAD, errors, json_body, octet_body
from server.schemas import AliasRequest
from server.state import state_of
from server.uploads import upload

LOAD_TIMEOUT_S = 30.0
# Of a route that takes a reference: name, name@3, name@alias, name@sha256:<hex>
NAMED = ("adapter_not_found", "version_not_found", "adapter_damaged", "validation_error")
REMOVE = (*READ, *NAMED, "read_only", "storage_full")
MAX_PAGE = 1000


def _may_use(request: Request) -> None:
    name = request.path_params.get("name")
    if name is not None:
        check_adapter(request, name)


router = APIRouter(prefix="/adapters", tags=["adapters"], dependencies=[Depends(_may_use)])


class NameConvertor(Convertor[str]):
    """Any text, with slashes and line ends: the name's own rule refuses it with a sentence.

    Starlette's `path` would cut a trailing line end off and serve the rest.
    """

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("adapter", NameConvertor())


@router.get("", responses=errors(*READ, "validation_error"))
async def adapters(request: Request) -> Response:
    """Adapters by name: `limit` of them (100) behind the name `after`; `next` is where to go on.

    `unusable` are the files of the adapter folder that could not be published at the start.
    """
    library = state_of(request).library
    limit = _integer(request, "limit", 100)
    if not 1 <= limit <= MAX_PAGE:
        raise BadInput(f"limit must be 1 to {MAX_PAGE}")
    after = request.query_params.get("after", "")
    caller = caller_of(request)
    patterns = (caller.key.adapters if caller else ()) or ("*",)
    page = await asyncio.to_thread(library.registry.page, after, limit + 1, patterns)
    data = [_summary(named, library) for named in page[:limit]]
    following = page[limit - 1].name if len(page) > limit else None
    own = [each for each in library.unusable if caller is None or caller.key.may_use(each.name)]
    unusable = [asdict(each) for each in own[:MAX_PAGE]]
    answer = {"object": "list", "data": data, "next": following, "unusable": unusable}
    return JSONAnswer(answer)


@router.put(
    "/{name:adapter}/aliases/{alias}",
    responses=errors(*BODY, "adapter_not_found", "version_not_found", "version_conflict"),
    openapi_extra=json_body(AliasRequest),
)
async def put_alias(request: Request, name: str, alias: str) -> Response:
    """Point an alias, or `current`, at a version; If-Match: the alias' generation, 0 if new."""
    state = state_of(request)
    body = await read_json(request, AliasRequest, state.settings.max_body_bytes)
    check_name(name)
    pointer = await asyncio.to_thread(
        state.library.registry.point,
        name,
        alias,
        body.version,
        _who(request),
        _condition(request, "if-match"),
    )
    return JSONAnswer(
        {
            "name": name,
            "alias": alias,
            "version": pointer.number,
            "previous": pointer.previous,
            "generation": pointer.generation,
        }
    )


@router.post(
    "/{name:adapter}/load",
    responses=errors(*READ, *NAMED, "overloaded") | {202: {"description": "It still loads."}},
)
async def load(request: Request, name: str) -> Response:
    """Bring it into the slots; 200 when it is there, 202 while that still goes on."""
    library = state_of(request).library
    version, done = await asyncio.to_thread(library.load, name, LOAD_TIMEOUT_S)
    return JSONAnswer(_residency(version, library), 200 if done else 202)


@router.post(
    "/{name:adapter}/unload", responses=errors(*READ, *NAMED, "read_only", "storage_full") | IN_USE
)
async def unload(request: Request, name: str) -> Response:
    """Take it out of the slots: 202 with in_flight while requests use it, 200 when it is gone."""
    library = state_of(request).library
    version, in_flight = await asyncio.to_thread(library.unload, name, _who(request))
    answer = _residency(version, library) | {"in_flight": in_flight}
    return JSONAnswer(answer, 202 if in_flight else 200)


@router.post(
    "/{name:adapter}/pin",
    responses=errors(*READ, *NAMED, "overloaded", "read_only", "storage_full"),
)
async def pin(request: Request, name: str) -> Response:
    """Load it and exempt it from eviction."""
    library = state_of(request).library
    version = await asyncio.to_thread(library.pin, name, _who(request))
    return JSONAnswer(_residency(version, library))


@router.post("/{name:adapter}/unpin", responses=errors(*READ, *NAMED, "read_only", "storage_full"))
async def unpin(request: Request, name: str) -> Response:
    """Let it be evicted again."""
    library = state_of(request).library
    version = await asyncio.to_thread(library.unpin, name, _who(request))
    return JSONAnswer(_residency(version, library))


@router.post(
    "/{name:adapter}/verify", responses=errors(*READ, "adapter_not_found", "validation_error")
)
async def verify(request: Request, name: str) -> Response:
    """Hash the stored files of all versions again."""
    library = state_of(request).library
    check_name(name)
    named = await asyncio.to_thread(library.registry.named, name)
    faults = {
        str(version.number): await asyncio.to_thread(library.store.verify, version.digest)
        for version in named.versions
    }
    return JSONAnswer({"name": name, "sound": not any(faults.values()), "versions": faults})


@router.delete("/{name:adapter}/versions/{number}", responses=errors(*REMOVE) | IN_USE)
async def delete_version(request: Request, name: str, number: str) -> Response:
    """Unpublish one version at once; its memory and file are freed when the last request ends."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}", number):
        raise BadInput("a version is a number from 1")
    return await _delete(request, name, int(number))


@router.put(
    "/{name:adapter}",
    responses=errors(*UPLOAD) | {201: {"description": "A new version."}},
    openapi_extra=octet_body(),
)
async def put(request: Request, name: str) -> Response:
    """Upload a version. If-Match: the current version; If-None-Match: *; query activate,
    allow_zero. 201: new; 200: these very bytes are the current version."""
    state = state_of(request)
    if state.draining:
        raise Draining("the server is stopping", retry_after_s=5)
    wanted = Upload(
        name,
        _who(request),
        activate=_flag(request, "activate", True),
        allow_zero=_flag(request, "allow_zero", False),
        if_match=_condition(request, "if-match"),
        must_be_new=_must_be_new(request),
    )
    await asyncio.to_thread(state.library.check_upload, wanted)
    settings = state.settings
    async with upload(
        request, state.library.store, settings.max_adapter_bytes, settings.receive_timeout_s
    ) as incoming:
        version, is_new = await asyncio.to_thread(state.library.publish, wanted, incoming)
    answer = _version_entry(version) | {"name": name}
    headers = {"etag": f'"{version.number}"', "location": f"/adapters/{name}"}
    return JSONAnswer(answer, 201 if is_new else 200, headers)


@router.get("/{name:adapter}", responses=errors(*READ, "adapter_not_found", "validation_error"))
async def get(request: Request, name: str) -> Response:
    """One adapter: its versions with what each changes, its pointers, and its audit trail."""
    library = state_of(request).library
    check_name(name)
    named = await asyncio.to_thread(library.registry.named, name)
    audit = await asyncio.to_thread(library.registry.audit, name)
    versions = [
        _version_entry(version)
        | {
            "resident": library.slots.is_resident(version.digest),
            "pinned": library.slots.is_pinned(version.digest),
            "in_flight": library.leases.of_digest(version.digest),
        }
        for version in named.versions
    ]
    headers = {"etag": f'"{named.current.number}"'} if named.current else {}
    answer = _summary(named, library) | {"versions": versions, "audit": audit}
    return JSONAnswer(answer, headers=headers)


@router.delete("/{name:adapter}", responses=errors(*REMOVE) | IN_USE)
async def delete(request: Request, name: str) -> Response:
    """Unpublish a name with all its versions at once: 202 while requests use it, else 200."""
    return await _delete(request, name, None)


async def _delete(request: Request, name: str, number: int | None) -> Response:
    check_name(name)
    library = state_of(request).library
    in_flight = await asyncio.to_thread(library.remove, name, number, _who(request))
    answer = {"name": name, "version": number, "in_flight": in_flight}
    return JSONAnswer(answer, 202 if in_flight else 200)


def _summary(named: Named, library: Library) -> dict[str, Any]:
    """One row of the list; digest, rank, bytes and created_at are the current version's."""
    current = named.current or named.versions[-1]
    usage = library.usage(named.name)
    return {
        "name": named.name,
        "version": named.current.number if named.current else None,
        "aliases": {
            pointer.alias: {
                "version": pointer.number,
                "previous": pointer.previous,
                "generation": pointer.generation,
            }
            for pointer in named.pointers
        },
        "versions": [version.number for version in named.versions],
        "digest": current.digest,
        "rank": current.manifest.rank,
        "bytes": current.bytes,
        "created_at": current.created_at,
        "resident": library.slots.is_resident(current.digest),
        "in_flight": library.leases.of_name(named.name),
        "requests": usage.requests,
        "last_used": usage.last_used,
    }


def _version_entry(version: Version) -> dict[str, Any]:
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


def _residency(version: Version, library: Library) -> dict[str, Any]:
    return {
        **(adapter_entry(version) or {}),
        "resident": library.slots.is_resident(version.digest),
        "pinned": library.slots.is_pinned(version.digest),
        "in_flight": library.leases.of_digest(version.digest),
    }


def _who(request: Request) -> str:
    """Of the audit trail: the key's name and id, or where the request is from."""
    caller = caller_of(request)
    if caller is not None:
        return f"{caller.key.name} {caller.key.id}".strip()
    return request.client.host if request.client else "unknown"


def _condition(request: Request, header: str) -> int | None:
    value = request.headers.get(header)
    if value is None:
        return None
    match = re.fullmatch(r'"?([0-9]{1,9})"?', value.strip())
    if match is None:
        raise BadInput(f"{header} must be one number in quotes")
    return int(match[1])


def _must_be_new(request: Request) -> bool:
    value = request.headers.get("if-none-match")
    if value not in (None, "*"):
        raise BadInput("if-none-match must be *")
    return value == "*"


def _flag(request: Request, name: str, default: bool) -> bool:
    value = request.query_params.get(name, str(default).lower())
    if value not in ("true", "false"):
        raise BadInput(f"{name} must be true or false")
    return value == "true"


def _integer(request: Request, name: str, default: int) -> int:
    value = request.query_params.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise BadInput(f"{name} must be a number")
    return int(value)
