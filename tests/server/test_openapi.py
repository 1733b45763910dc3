"""The OpenAPI document is valid, complete, and its examples succeed, also on its page in a browser.

The demo trunk answers them, on a server with keys.
"""

import keyword
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import document_of
from docs_page import browser_path, docs_page
from openapi_spec_validator import validate
from stated import Document

from server.guard import is_public
from server.routes.documented import STORED_AT

OF_EVERY_ROUTE = {"400", "408", "431"}
OF_KEYS = {"401", "403", "429"}
# A body of bytes that is there to be sent, and where it goes before each of these operations
DESTRUCTIVE = {("delete", "/adapters/{name}"), ("delete", "/adapters/{name}/versions/{number}")}
UPLOAD = ("put", "/adapters/{name}")
LORA = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

PAGE_ROUTES = os.environ.get("PAGE_ROUTES")  # all, or some, tried in a browser
SCREENSHOT = os.environ.get("SCREENSHOT")  # where a picture of the page is to be put

Operation = tuple[str, str, dict[str, Any]]


@pytest.fixture(scope="module")
def stated(keyed_demo: Any) -> Document:
    return document_of(keyed_demo.served.url)


@pytest.fixture(scope="module")
def document(stated: Document) -> dict[str, Any]:
    return stated.document


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> list[Operation]:
    return [
        (method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    validate(document)  # raises OpenAPIValidationError


def test_operation_ids_are_names_of_methods_and_none_is_there_twice(
    document: dict[str, Any],
) -> None:
    ids = [each["operationId"] for item in document["paths"].values() for each in item.values()]
    assert len(ids) == len(set(ids))
    assert [name for name in ids if not name.isidentifier() or keyword.iskeyword(name)] == []
    assert {"encode", "critic", "classify", "list_adapters", "put_adapter", "info"} <= set(ids)


def test_schemas_are_components_with_names_of_their_own(document: dict[str, Any]) -> None:
    names = document["components"]["schemas"]
    assert [name for name in names if "__" in name] == []  # two classes of one name
    assert "$defs" not in str(document)


def test_every_operation_says_what_it_is_and_types_every_answer(
    operations: list[Operation],
) -> None:
    faults = [
        f"{method.upper()} {path}: {fault}"
        for method, path, operation in operations
        for fault in (
            *untyped(operation),
            *undescribed(operation),
            *errors_left_out(path, method, operation),
        )
    ]
    assert not faults, "\n".join(faults)


def untyped(operation: dict[str, Any]) -> Iterator[str]:
    """A success whose content has no schema; one without content is a 204, a 304, or a fault."""
    if not any(status.startswith("2") for status in operation["responses"]):
        yield "no success is stated"
    for status, answer in operation["responses"].items():
        content = answer.get("content", {})
        if not content and status not in ("204", "304"):
            yield f"{status} has no content"
        for kind, media in content.items():
            if not media.get("schema"):
                yield f"{status} has no schema of {kind}"
        if "x-request-id" not in answer.get("headers", {}):
            yield f"{status} has no x-request-id"


def undescribed(operation: dict[str, Any]) -> Iterator[str]:
    for field in ("summary", "description", "tags"):
        if not operation.get(field):
            yield f"it has no {field}"
    for parameter in operation["parameters"]:
        if "$ref" in parameter:
            continue
        if not parameter.get("description"):
            yield f"parameter {parameter['name']} has no description"
        if parameter.get("required") and "example" not in parameter:
            yield f"parameter {parameter['name']} has no example"
    for kind, media in operation.get("requestBody", {}).get("content", {}).items():
        if kind in ("application/json", "application/octet-stream") and not media.get("examples"):
            yield f"the body {kind} has no example"


def errors_left_out(path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    public = is_public(method.upper(), path)
    wanted = OF_EVERY_ROUTE if public else OF_EVERY_ROUTE | OF_KEYS
    for status in wanted - set(operation["responses"]):
        yield f"{status} is not stated"
    for status, answer in operation["responses"].items():
        if status >= "400" and not answer.get("x-codes"):
            yield f"{status} has no x-codes"
    if public == bool(operation.get("security")):
        yield "it is not said whether it needs a key"


def test_the_examples_are_what_the_schemas_say(
    stated: Document, operations: list[Operation]
) -> None:
    faults = []
    for method, path, operation in operations:
        for kind, media in contents(operation):
            examples = [
                one["value"] for one in media.get("examples", {}).values() if "value" in one
            ]
            examples += [media["example"]] if "example" in media else []
            for number, example in enumerate(examples):
                key = f"{method} {path} {kind} {id(media)}"
                found = stated.faults(media["schema"], example, key)
                faults += [f"{method} {path} {kind} {number}: {fault}" for fault in found]
    assert not faults, "\n".join(faults)


def contents(operation: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in (operation.get("requestBody", {}), *operation["responses"].values()):
        yield from entry.get("content", {}).items()


def test_every_example_of_the_document_succeeds_on_the_demo(
    keyed_demo: Any, operations: list[Operation]
) -> None:
    by_place = {(method, path): operation for method, path, operation in operations}
    failed = []
    with keyed_demo.client() as client:
        for method, path, operation in sorted(operations, key=turn):
            if (method, path) in DESTRUCTIVE:
                list(sent(client, *UPLOAD, by_place[UPLOAD]))
            for answer in sent(client, method, path, operation):
                if not answer.is_success:
                    failed.append(
                        f"{method} {answer.url}: {answer.status_code} {answer.text[:200]}"
                    )
    assert not failed, "\n".join(failed)


def turn(operation: Operation) -> tuple[int, int]:
    """Uploads, then all else, then what deletes; of vLLM's routes load before unload."""
    method, path, _ = operation
    stage = 0 if (method, path) == UPLOAD else 2 if method == "delete" else 1
    return (3, LORA.index(path)) if path in LORA else (stage, 0)


def sent(
    client: httpx.Client, method: str, path: str, operation: dict[str, Any]
) -> Iterator[httpx.Response]:
    """The answers to each example of the body, with the examples of all parameters."""
    parameters = [each for each in operation["parameters"] if "example" in each]
    of = {
        place: {each["name"]: str(each["example"]) for each in parameters if each["in"] == place}
        for place in ("path", "query", "header")
    }
    kinds = operation.get("requestBody", {}).get("content", {}).items()
    bodies = [
        (kind, example) for kind, media in kinds for example in media.get("examples", {}).values()
    ]
    for kind, example in bodies or [(None, None)]:
        headers = of["header"] | ({"content-type": kind} if kind else {})
        content = {} if example is None else body_of(client, example)
        url = path.format(**of["path"])
        yield client.request(method, url, params=of["query"], headers=headers, **content)


def body_of(client: httpx.Client, example: dict[str, Any]) -> dict[str, Any]:
    """The example itself, or the bytes that the server has at the place that it names."""
    if "value" in example:
        return {"json": example["value"]}
    return {"content": client.get(example[STORED_AT]).raise_for_status().content}


def test_binary_answers_of_an_example_are_as_the_document_says(
    keyed_demo: Any, document: dict[str, Any]
) -> None:
    encode = document["paths"]["/encode"]["post"]
    body = encode["requestBody"]["content"]["application/json"]["examples"]["embedding"]["value"]
    kinds = set(encode["responses"]["200"]["content"])
    assert kinds >= {"application/octet-stream", "application/vnd.safetensors"}
    with keyed_demo.client() as client:
        for kind in kinds:
            answer = client.post("/encode", json=body, headers={"accept": kind})
            assert answer.headers["content-type"] == kind
            if kind == "application/octet-stream":
                assert "x-trunkline-metadata" in answer.headers
                assert "x-trunkline-metadata" in encode["responses"]["200"]["headers"]


def test_a_browser_tries_the_inference_routes_on_the_page_with_a_key(
    keyed_demo: Any, operations: list[Operation], tmp_path: Path
) -> None:
    if not PAGE_ROUTES:
        pytest.skip("it takes ten seconds of a core: make docs-page")
    browser = browser_path()
    if browser is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    url = keyed_demo.served.url
    known = {
        each["operationId"]: each["tags"][0]
        for method, _, each in operations
        if method == "post" and each["tags"] != ["adapters"]
    }
    assert {"encode", "critic", "classify", "embeddings", "rerank", "embed"} <= set(known)
    tried = known if PAGE_ROUTES == "all" else PAGE_ROUTES.split(",")
    with docs_page(browser, tmp_path / "profile") as page:
        page.open(f"{url}/")  # which leads to /docs
        assert page.page.url == f"{url}/docs"
        page.authorize(keyed_demo.key)
        for operation_id in tried:
            status, body = page.try_out(known[operation_id], operation_id)
            assert status == 200, f"{operation_id}: {status} {body}"
            assert re.match(r"(Download\n)?[{\[]", body), operation_id
        if SCREENSHOT:
            page.page.screenshot(path=SCREENSHOT)
        assert page.complaints == []
        assert [each for each in page.requested if not each.startswith((url, "data:"))] == []


def test_the_page_and_its_files_are_the_servers_own_and_need_no_key(keyed_demo: Any) -> None:
    with keyed_demo.served.client() as client:
        assert client.get("/", follow_redirects=True).url.path == "/docs"
        page = client.get("/docs").text
        sources = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert any(source.endswith(".js") for source in sources)
        assert any(source.endswith(".css") for source in sources)
        for source in sources:
            assert source.startswith("/"), source
            assert client.get(source).status_code == 200, source
        assert client.get("/redoc").status_code != 200
        assert client.get("/info").status_code == 401
