"""/adapters: upload, list, promote, download, delete."""

import re
from contextlib import ExitStack
from dataclasses import asdict

from fastapi import APIRouter, Depends
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from adapters.errors import NotFound, VersionNotFound
from adapters.library import Upload
from adapters.listing import SORTS, Wanted
from adapters.names import check_name
from adapters.version_pages import Listed, listed, one_version, version_page
from server.adapter_answers import placed_version, summary, version_entry
from server.answer_shapes.adapters import (
    Adapter,
    AdapterList,
    MovedAlias,
    NamedVersion,
    Removed,
    Uploaded,
)
from server.answer_size import AnswerSize
from server.answers import JSONAnswer, json_answer
from server.arrivals import publish
from server.bodies import read_json
from server.building import built, hold_answer
from server.conditions import condition_of, etag, not_modified
from server.engine.errors import BadInput, Draining
from server.guard import caller_of, check_adapter, key_of, patterns_of
from server.json_pieces import Items
from server.query import Query
from server.routes import adapter_documents as says
from server.routes.documented import (
    BODY,
    LARGE_ANSWER,
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
MAX_VERSION = 999_999_999
ROWS_OF_A_PIECE = 32
# The most bytes of a row, or of an alias in it; of a version without its record; of a file that
# can't be served; and of an entry of the audit trail.
ROW_BYTES, VERSION_BYTES, FILE_BYTES, AUDIT_BYTES = 1024, 1024, 8192, 2048
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
    responses=errors(*READ, "validation_error", *LARGE_ANSWER)
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
        patterns_of(request) or ("*",),
        query.integer("limit", 100, 1, MAX_PAGE),
        query.text("after", MAX_CURSOR),
    )
    page, following = await state_of(request).admin.call(request, library.page, wanted)
    data = Items((summary(named, library) for named in page), ROWS_OF_A_PIECE)
    own = [each for each in library.unusable if caller is None or caller.key.may_use(each.name)]
    unusable = [asdict(each) for each in own[:MAX_PAGE]]
    answer = {"object": "list", "data": data, "next": following, "unusable": unusable}
    size = AnswerSize(0, sum(map(_row_bytes, page)) + FILE_BYTES * len(unusable))
    hold_answer(request, size)
    return await built(request, size, lambda: json_answer(size, answer))


def _row_bytes(listed: Listed) -> int:
    """The most bytes of a row of the list."""
    return ROW_BYTES + 12 * len(listed.numbers) + ROW_BYTES * len(listed.pointers)


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
    version = await state_of(request).admin.call(
        request, one_version, library.registry.rows, name, wanted
    )
    if version is None:
        if not await state_of(request).admin.call(request, library.registry.exists, name):
            raise NotFound(f"no adapter is named {name}")
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
    admin, held = state_of(request).admin, ExitStack()
    held.enter_context(admin.downloads.take(key_of(request)))  # a descriptor each
    try:
        return await admin.call(request, StoredFile, library.store, version, held)
    except BaseException:
        held.close()
        raise


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
        patterns=patterns_of(request),
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
    responses=errors(
        *READ, *says.CONDITIONS, "adapter_not_found", "validation_error", *LARGE_ANSWER
    )
    | _read(ok(Adapter, says.ADAPTER_EXAMPLE, says="The adapter.")),
    openapi_extra=parameters(says.IF_MATCH, says.IF_NONE_MATCH, *says.VERSIONS_PARAMETERS),
)
async def get(request: Request, name: str) -> Response:
    """One adapter: its versions with what each changes, its pointers, and its audit trail.

    A page of versions ends after 8 MiB of what is known of them, too. `versions_next` is the
    `versions_after` of the next page.
    """
    library = state_of(request).library
    rows = library.registry.rows
    check_name(name)
    condition = condition_of(request)
    query = Query(request, "versions_limit", "versions_after")
    limit = query.integer("versions_limit", MAX_PAGE, 1, MAX_PAGE)
    after = query.integer("versions_after", 0, 0, MAX_VERSION)
    found = await state_of(request).admin.call(request, listed, rows, [name])
    if not found:
        raise NotFound(f"no adapter is named {name}")
    current = found[0].current
    known = not_modified(condition, current)
    if known is not None:
        return known
    audit = await state_of(request).admin.call(request, library.registry.audit, name)
    page, more, record_bytes = await state_of(request).admin.call(
        request, version_page, rows, name, after, limit
    )
    versions = Items(placed_version(version, library) for version in page)
    headers = {} if current is None else {"etag": etag(current)}
    answer = summary(found[0], library) | {"versions": versions, "versions_next": more}
    answer |= {"audit": audit}
    size = VERSION_BYTES * len(page) + record_bytes + AUDIT_BYTES * len(audit)
    counted = AnswerSize(0, _row_bytes(found[0]) + size)
    hold_answer(request, counted)
    return await built(request, counted, lambda: json_answer(counted, answer, headers))


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
