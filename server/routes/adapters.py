"""/adapters: upload, list, promote, download, delete."""

import re
from dataclasses import asdict

from fastapi import APIRouter, Depends
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from adapters.errors import VersionNotFound
from adapters.library import Upload
from adapters.listing import SORTS, Wanted
from adapters.names import check_name
from server.adapter_answers import placed_version, summary, version_entry
from server.answer_shapes.adapters import (
    Adapter,
    AdapterList,
    MovedAlias,
    NamedVersion,
    Removed,
    Uploaded,
)
from server.answers import JSONAnswer
from server.arrivals import publish
from server.bodies import read_json
from server.conditions import condition_of, etag, not_modified
from server.engine.errors import BadInput, Draining
from server.guard import caller_of, check_adapter
from server.query import Query
from server.routes import adapter_documents as says
from server.routes.documented import (
    BODY,
    READ,
    UPLOAD,
    Responses,
    errors,
    json_body,
    ok,
    parameters,
)
from server.schemas import AliasRequest
from server.state import state_of
from server.stored_file import CACHED, StoredFile
from server.uploads import upload

# Of a route that takes a reference: name, name@3, name@alias, name@sha256:<hex>
NAMED = ("adapter_not_found", "version_not_found", "adapter_damaged", "validation_error")
MAX_PAGE = 1000
MAX_Q, MAX_CURSOR = 200, 1000  # characters

REMOVED = ok(Removed, says.REMOVED_EXAMPLE, says="It is gone.") | ok(
    Removed, says.REMOVED_EXAMPLE | {"in_flight": 2}, status=202, says="Requests use it yet."
)
REMOVE = errors(*READ, *says.CONDITIONS, *NAMED, "read_only", "storage_full") | REMOVED
CONDITIONAL = parameters(says.IF_MATCH, says.IF_NONE_MATCH)


def _read(answer: Responses, *headers: str) -> Responses:
    """The stated answers of a conditional read: `answer` with its ETag, and 304."""
    known = says.with_headers(says.NOT_MODIFIED, "ETag")
    return says.with_headers(answer, "ETag", *headers) | known


def may_use_adapter(request: Request) -> None:
    """Raises RequestError where the key may not use the adapter in the path."""
    name = request.path_params.get("name")
    if name is not None:
        check_adapter(request, name)


router = APIRouter(prefix="/adapters", tags=["adapters"], dependencies=[Depends(may_use_adapter)])


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


@router.get(
    "",
    responses=errors(*READ, "validation_error")
    | ok(AdapterList, says.LIST_EXAMPLE, says="A page."),
    openapi_extra=parameters(*says.LIST_PARAMETERS),
)
async def adapters(request: Request) -> Response:
    """A page of the adapters that the key may see. `next` is the `after` of the next page.

    `unusable` are the files of the adapter folder that could not be published at the start.
    """
    library = state_of(request).library
    query = Query(request, "q", "sort", "order", "limit", "after")
    caller = caller_of(request)
    wanted = Wanted(
        query.choice("sort", SORTS),
        query.choice("order", ("asc", "desc")) == "desc",
        query.text("q", MAX_Q),
        (caller.key.adapters if caller else ()) or ("*",),
        query.integer("limit", 100, 1, MAX_PAGE),
        query.text("after", MAX_CURSOR),
    )
    page, following = await state_of(request).admin.call(request, library.page, wanted)
    data = [summary(named, library) for named in page]
    own = [each for each in library.unusable if caller is None or caller.key.may_use(each.name)]
    unusable = [asdict(each) for each in own[:MAX_PAGE]]
    answer = {"object": "list", "data": data, "next": following, "unusable": unusable}
    return JSONAnswer(answer)


@router.put(
    "/{name:adapter}/aliases/{alias}",
    responses=errors(*BODY, *says.CONDITIONS, *NAMED, "read_only", "storage_full")
    | says.with_headers(ok(MovedAlias, says.ALIAS_EXAMPLE, says="It is moved."), "ETag"),
    openapi_extra=json_body(AliasRequest, promote={"version": 1}) | CONDITIONAL,
)
async def put_alias(request: Request, name: str, alias: str) -> Response:
    """Point an alias, or `current`, at a version. The ETag is the alias' generation, 0 if new."""
    state = state_of(request)
    condition = condition_of(request)
    body = await read_json(request, AliasRequest, state.settings.max_body_bytes)
    check_name(name)
    pointer = await state_of(request).admin.call(
        request,
        state.library.registry.point,
        name,
        alias,
        body.version,
        who(request),
        condition,
    )
    answer = {"name": name, "alias": alias, "version": pointer.number}
    answer |= {"previous": pointer.previous, "generation": pointer.generation}
    return JSONAnswer(answer, headers={"etag": etag(pointer.generation)})


@router.delete("/{name:adapter}/versions/{number}", responses=REMOVE, openapi_extra=CONDITIONAL)
async def delete_version(request: Request, name: str, number: str) -> Response:
    """Unpublish one version at once; its memory and file are freed when the last request ends."""
    return await _delete(request, name, _version_number(number))


@router.get(
    "/{name:adapter}/versions/{number}",
    responses=errors(
        *READ, *says.CONDITIONS, "adapter_not_found", "version_not_found", "validation_error"
    )
    | _read(ok(NamedVersion, says.VERSION_EXAMPLE, says="The version.")),
    openapi_extra=CONDITIONAL,
)
async def get_version(request: Request, name: str, number: str) -> Response:
    """One version: what it changes, and where it is now. A version never changes."""
    library = state_of(request).library
    check_name(name)
    wanted, condition = _version_number(number), condition_of(request)
    named = await state_of(request).admin.call(request, library.registry.named, name)
    version = next((each for each in named.versions if each.number == wanted), None)
    if version is None:
        raise VersionNotFound(f"{name} has no version {wanted}")
    known = not_modified(condition, wanted)
    if known is not None:
        return known
    answer = {"name": name} | placed_version(version, library)
    return JSONAnswer(answer, headers={"etag": etag(wanted)})


@router.get(
    "/{name:adapter}/file",
    responses=errors(*READ, *says.CONDITIONS, *NAMED, "overloaded")
    | _read(says.FILE, "Content-Digest", "Repr-Digest", "Content-Disposition"),
    openapi_extra=CONDITIONAL,
)
async def get_file(request: Request, name: str) -> Response:
    """The stored bytes of a reference, for the scope admin: weights are their owner's property."""
    library = state_of(request).library
    condition = condition_of(request)
    version = await state_of(request).admin.call(request, library.version, name)
    known = not_modified(condition, version.number, CACHED)
    if known is not None:
        return known
    return await state_of(request).admin.call(request, StoredFile, library.store, version)


@router.put(
    "/{name:adapter}",
    responses=errors(*UPLOAD)
    | says.with_headers(
        ok(Uploaded, says.UPLOADED_EXAMPLE, says="These very bytes are the current version.")
        | ok(Uploaded, says.UPLOADED_EXAMPLE, status=201, says="A new version."),
        "ETag",
        "Location",
    ),
    openapi_extra=says.upload_body() | parameters(*says.UPLOAD_PARAMETERS),
)
async def put(request: Request, name: str) -> Response:
    """Upload a version: an adapter file, or a PEFT folder as zip, tar, tar.gz or multipart."""
    state = state_of(request)
    if state.draining:
        raise Draining("the server is stopping", retry_after_s=5)
    query = Query(request, "activate", "allow_zero")
    wanted = Upload(
        name,
        who(request),
        activate=query.flag("activate", True),
        allow_zero=query.flag("allow_zero", False),
        condition=condition_of(request),
    )
    await state_of(request).admin.call(request, state.library.check_upload, wanted)
    settings = state.settings
    async with upload(
        request, state.library.store, settings.max_adapter_bytes, settings.receive_timeout_s
    ) as arrived:
        published = await publish(
            request, state.library, wanted, arrived, settings.max_adapter_bytes
        )
    answer = version_entry(published.version) | {"name": name}
    answer |= {} if published.converted is None else {"converted": published.converted}
    headers = {"etag": etag(published.version.number), "location": f"/adapters/{name}"}
    return JSONAnswer(answer, 201 if published.is_new else 200, headers)


@router.get(
    "/{name:adapter}",
    responses=errors(*READ, *says.CONDITIONS, "adapter_not_found", "validation_error")
    | _read(ok(Adapter, says.ADAPTER_EXAMPLE, says="The adapter.")),
    openapi_extra=CONDITIONAL,
)
async def get(request: Request, name: str) -> Response:
    """One adapter: its versions with what each changes, its pointers, and its audit trail."""
    library = state_of(request).library
    check_name(name)
    condition = condition_of(request)
    named = await state_of(request).admin.call(request, library.registry.named, name)
    current = named.current.number if named.current else None
    known = not_modified(condition, current)
    if known is not None:
        return known
    audit = await state_of(request).admin.call(request, library.registry.audit, name)
    versions = [placed_version(version, library) for version in named.versions]
    headers = {} if current is None else {"etag": etag(current)}
    answer = summary(named, library) | {"versions": versions, "audit": audit}
    return JSONAnswer(answer, headers=headers)


@router.delete("/{name:adapter}", responses=REMOVE, openapi_extra=CONDITIONAL)
async def delete(request: Request, name: str) -> Response:
    """Unpublish a name with all its versions at once: 202 while requests use it, else 200."""
    return await _delete(request, name, None)


async def _delete(request: Request, name: str, number: int | None) -> Response:
    check_name(name)
    library = state_of(request).library
    condition = condition_of(request)
    in_flight = await state_of(request).admin.call(
        request, library.remove, name, number, who(request), condition
    )
    answer = {"name": name, "version": number, "in_flight": in_flight}
    return JSONAnswer(answer, 202 if in_flight else 200)


def who(request: Request) -> str:
    """Of the audit trail: the key's name and id, or where the request is from."""
    caller = caller_of(request)
    if caller is not None:
        return f"{caller.key.name} {caller.key.id}".strip()
    return request.client.host if request.client else "unknown"


def _version_number(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise BadInput("a version is a number from 1")
    return int(text)
