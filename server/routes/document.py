"""The OpenAPI document as a whole: named schemas, operation ids, headers, keys, names in paths."""

import re
from collections.abc import Iterator
from typing import Any

from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from adapters.names import ALIAS_PATTERN, NAME_PATTERN
from server.guard import PUBLIC, needed
from server.routes.documented import COMPONENTS, ERROR_SHAPES, public_errors

Json = dict[str, Any]

METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
VERBS = ("get", "put", "delete", "load", "unload", "pin", "unpin", "verify")
ABOUT = """Serves many per-layer LoRA adapters over one shared encoder.

`adapter` is an adapter reference: `name`, `name@3` (a version), `name@stable` (an alias),
`name@sha256:<hex>` (a digest); `base`, null or no `adapter` is the backbone alone.
Every example succeeds as it stands on the demo trunk, which `trunkline serve` serves."""
TAGS = {
    "inference": "Embeddings, critic values, labels, masked tokens.",
    "openai": "OpenAI's shapes, for its clients.",
    "tokenizer": "Texts to tokens and back.",
    "adapters": "Upload, list, promote, load, delete.",
    "operations": "Health, readiness, metrics, and what is served.",
}
# Of what stands in a path: its pattern, an example, and what it is
PATH_PARAMETERS = {
    "name": (NAME_PATTERN, "verses", "An adapter's name: `name` or `namespace/name`."),
    "alias": (ALIAS_PATTERN, "stable", "An alias of the adapter, or `current`."),
    "number": (r"^[1-9][0-9]{0,8}$", "1", "The number of a version."),
}
OWN_EXAMPLE = "my-adapter"  # a name that the examples of uploading and deleting use
REQUEST_ID = {
    "name": "x-request-id",
    "in": "header",
    "description": "An id of yours for the logs: 1 to 64 of A-Z a-z 0-9 . _ -, else one is made.",
    "schema": {"type": "string"},
}
HEADERS = {
    "RequestId": ("x-request-id", "The request's own id where it was sane, else a new one."),
    "RetryAfter": ("retry-after", "Seconds after which to ask again, where they are known."),
    "Authenticate": ("www-authenticate", "Bearer: an API key is needed."),
}
SCHEMES = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "header": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same API key, in a header of its own.",
    },
}


def operation_id(route: APIRoute) -> str:
    """The function's name; a bare verb gets the noun of its tag (put_adapter), a bare noun list_.

    A generated client names its methods after it.
    """
    tag = str(route.tags[0]) if route.tags else ""
    if route.name == tag:
        return f"list_{tag}"
    return f"{route.name}_{tag.removesuffix('s')}" if route.name in VERBS else route.name


def completed(document: Json) -> Json:
    """FastAPI's document with what is the same for all routes, and every schema under a name."""
    document["info"] |= {
        "description": ABOUT,
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    }
    document["paths"]["/openapi.json"] = {"get": _itself()}
    components = document.setdefault("components", {})
    components["securitySchemes"] = SCHEMES
    components["parameters"] = {"RequestId": REQUEST_ID}
    components["headers"] = {name: _header(text) for name, (_, text) in HEADERS.items()}
    schemas = components.setdefault("schemas", {})
    schemas |= _error_schemas()
    for method, path, operation in operations(document):
        _complete(method, path, operation)
        _name_body(operation, schemas)
    components["schemas"] = dict(sorted(schemas.items()))
    used = {tag for _, _, operation in operations(document) for tag in operation.get("tags", ())}
    document["tags"] = [{"name": n, "description": TAGS[n]} for n in TAGS if n in used]
    return document


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Method, path and operation, of each."""
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield method, path, item[method]


def _itself() -> Json:
    """The operation that answers the document: FastAPI's own route leaves itself out."""
    shape = {"type": "object", "title": "OpenAPIDocument", "additionalProperties": True}
    done = {"description": "Done.", "content": {"application/json": {"schema": shape}}}
    responses = {"200": done} | {str(code): entry for code, entry in public_errors().items()}
    about = {"tags": ["operations"], "description": "This document."}
    return {**about, "operationId": "openapi", "responses": responses}


def _header(description: str) -> Json:
    return {"description": description, "schema": {"type": "string"}}


def _error_schemas() -> Json:
    shapes = [(shape, "serialization") for shape in ERROR_SHAPES]
    _, found = models_json_schema(shapes, ref_template=COMPONENTS)  # type: ignore[arg-type]
    named: Json = found["$defs"]
    return named


def _complete(method: str, path: str, operation: Json) -> None:
    operation |= _texts(method, path, operation.get("description", ""))
    if path not in PUBLIC:
        # {}: on a server without keys none
        operation["security"] = [*({scheme: []} for scheme in SCHEMES), {}]
    entries = operation.setdefault("parameters", [])
    for entry in entries:
        _complete_path_parameter(method, entry, operation)
    entries.append({"$ref": "#/components/parameters/RequestId"})
    for status, response in operation["responses"].items():
        _add_headers(int(status), response)


def _texts(method: str, path: str, docstring: str) -> dict[str, str]:
    """The docstring's first sentence as the summary, all of it with the scope as description."""
    text = " ".join(docstring.split())
    first = re.split(r"(?<=[.:;]) ", text, maxsplit=1)[0].rstrip(".:;")
    scopes = " or ".join(f"`{scope}`" for scope in sorted(needed(method.upper(), path)))
    if path not in PUBLIC:
        text += f"\n\nWhere keys are configured, the key needs the scope {scopes}."
    return {"summary": first, "description": text.strip()}


def _complete_path_parameter(method: str, entry: Json, operation: Json) -> None:
    known = PATH_PARAMETERS.get(entry["name"])
    if entry["in"] != "path" or known is None:
        return
    pattern, example, description = known
    entry["schema"].setdefault("pattern", pattern)
    entry.setdefault("description", description)
    uploads = "application/octet-stream" in operation.get("requestBody", {}).get("content", {})
    own = entry["name"] == "name" and (method == "delete" or uploads)
    entry.setdefault("example", OWN_EXAMPLE if own else example)


def _add_headers(status: int, response: Json) -> None:
    names = ["RequestId"]
    if status in (429, 503):
        names.append("RetryAfter")
    if status == 401:
        names.append("Authenticate")
    headers = response.setdefault("headers", {})
    for name in names:
        headers[HEADERS[name][0]] = {"$ref": f"#/components/headers/{name}"}


def _name_body(operation: Json, schemas: Json) -> None:
    """The body's schema goes to the components, under its title, with those that it refers to."""
    for media in operation.get("requestBody", {}).get("content", {}).values():
        schema = media.get("schema", {})
        if "properties" not in schema:
            continue
        for name, inner in schema.pop("$defs", {}).items():
            _add(name, inner, schemas)
        _add(schema["title"], schema, schemas)
        media["schema"] = {"$ref": COMPONENTS.format(model=schema["title"])}


def _add(name: str, schema: Json, schemas: Json) -> None:
    """Raises ValueError where two unlike schemas have the same name."""
    if schemas.setdefault(name, schema) != schema:
        raise ValueError(f"two schemas of the OpenAPI document are called {name}")
