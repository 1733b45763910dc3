"""The OpenAPI document as a whole: named schemas, operation ids, headers, keys, names in paths."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import models_json_schema

from adapters.names import ALIAS_PATTERN, NAME_PATTERN
from server.guard import is_public, needed
from server.routes.answer_headers import add_headers, header_components
from server.routes.documented import (
    BYTES,
    CODES,
    COMPONENTS,
    ERROR_SHAPES,
    NULL,
    STORED,
    public_errors,
)

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
    "rerank": "Documents by their nearness to a query, in Cohere's, Jina's and vLLM's shapes.",
    "text-embeddings-inference": "The shapes of text-embeddings-inference, for its clients.",
    "tokenizer": "Texts to tokens and back.",
    "adapters": "Upload, list, promote, load, delete.",
    "operations": "Health, readiness, metrics, and what is served.",
}
# Of what stands in a path: its pattern, an example, and what it is
PATH_PARAMETERS = {
    "name": (NAME_PATTERN, "verses", "An adapter's name: `name` or `namespace/name`."),
    "alias": (ALIAS_PATTERN, "stable", "An alias of the adapter, or `current`."),
    "number": (r"^[1-9][0-9]{0,8}$", "1", "The number of a version."),
    "model": (None, "verses", "An adapter reference, or the backbone's id."),
}
OWN_EXAMPLE = "my-adapter"  # a name that the examples of uploading and deleting use
REQUEST_ID = {
    "name": "x-request-id",
    "in": "header",
    "description": "An id of yours for the logs: 1 to 64 of A-Z a-z 0-9 . _ -, else one is made.",
    "schema": {"type": "string"},
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
    components["headers"] = header_components()
    schemas = components.setdefault("schemas", {})
    schemas |= _error_schemas()
    _name_operations(document)
    for method, path, operation in operations(document):
        _complete(method, path, operation)
        for content in _contents(operation):
            _drop_untyped_json(content)
            _name_schemas(content, schemas)
    document["paths"] = _with_nulls(document["paths"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    nameless = {name: shape for name, shape in schemas.items() if not _is_named(shape)}
    kept = {name: shape for name, shape in sorted(schemas.items()) if name not in nameless}
    components["schemas"] = _one_spelling(_inlined(kept, nameless))
    document["paths"] = _inlined(document["paths"], nameless)
    used = {tag for _, _, operation in operations(document) for tag in operation.get("tags", ())}
    document["tags"] = [{"name": n, "description": TAGS[n]} for n in TAGS if n in used]
    return document


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Method, path and operation, of each."""
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield method, path, item[method]


def _name_operations(document: Json) -> None:
    """Operation ids that make good method names; no two are the same."""
    taken: set[str] = set()
    for method, path, operation in operations(document):
        name = _method_name(path, operation)
        if name in taken:  # one function, several paths: rerank, and rerank_v2 of /v2/rerank
            name = f"{name}_{path.split('/')[1]}" if method != "head" else f"head_{name}"
        taken.add(name)
        operation["operationId"] = name


def _method_name(path: str, operation: Json) -> str:
    """The function's name; a bare verb gets the noun of its tag (put_adapter), a bare noun list_.

    FastAPI's own id is the function's name, the path and a method; any other id was chosen.
    """
    flat = re.sub(r"\W", "_", path)
    name = re.sub(f"{flat}_({'|'.join(METHODS)})$", "", operation["operationId"])
    tag = operation.get("tags", [""])[0]
    if name == tag and "get" in operation["operationId"]:
        return f"list_{name}"
    return f"{name}_{tag.removesuffix('s')}" if name in VERBS else name


def _itself() -> Json:
    """The operation that answers the document: FastAPI's own route leaves itself out."""
    shape = {"type": "object", "title": "OpenAPIDocument", "additionalProperties": True}
    done = {"description": "Done.", "content": {"application/json": {"schema": shape}}}
    responses = {"200": done} | {str(code): entry for code, entry in public_errors().items()}
    about = {"tags": ["operations"], "description": "This document."}
    return {**about, "operationId": "openapi", "responses": responses}


def _error_schemas() -> Json:
    shapes = [(shape, "serialization") for shape in ERROR_SHAPES]
    _, found = models_json_schema(shapes, ref_template=COMPONENTS)  # type: ignore[arg-type]
    named: Json = found["$defs"]
    return named


def _complete(method: str, path: str, operation: Json) -> None:
    operation |= _texts(method, path, operation.get("description", ""))
    if not is_public(method.upper(), path):
        # {}: on a server without keys none
        operation["security"] = [*({scheme: []} for scheme in SCHEMES), {}]
    if _uploaded(operation):
        _uploaded(operation).setdefault("examples", STORED)
        _keep_one_kind_of_bytes(operation["requestBody"])
    entries = operation.setdefault("parameters", [])
    for entry in entries:
        _complete_path_parameter(method, entry, operation)
    entries.append({"$ref": "#/components/parameters/RequestId"})
    if CODES not in operation["responses"].get("422", {CODES: ()}):
        del operation["responses"]["422"]  # FastAPI's own; the handlers check their parameters
    for status, response in operation["responses"].items():
        add_headers(int(status), response, keyed="security" in operation)


def _texts(method: str, path: str, docstring: str) -> dict[str, str]:
    """The docstring's first sentence as the summary, all of it with the scope as description."""
    text = " ".join(docstring.split())
    first = re.split(r"(?<=[.:;]) ", text, maxsplit=1)[0].rstrip(".:;")
    scopes = " or ".join(f"`{scope}`" for scope in sorted(needed(method.upper(), path) or ()))
    if not is_public(method.upper(), path):
        text += f"\n\nWhere keys are configured, the key needs the scope {scopes}."
    return {"summary": first, "description": text.strip()}


def _complete_path_parameter(method: str, entry: Json, operation: Json) -> None:
    known = PATH_PARAMETERS.get(entry["name"])
    if entry["in"] != "path" or known is None:
        return
    pattern, example, description = known
    if pattern:
        entry["schema"].setdefault("pattern", pattern)
    entry.setdefault("description", description)
    own = entry["name"] == "name" and (method == "delete" or _uploaded(operation))
    entry.setdefault("example", OWN_EXAMPLE if own else example)


def _uploaded(operation: Json) -> Json:
    """What is said of a body of bytes; empty where the operation takes none."""
    content: Json = operation.get("requestBody", {}).get("content", {})
    return content.get("application/octet-stream") or {}


def _keep_one_kind_of_bytes(body: Json) -> None:
    """Content types of raw bytes beside octet-stream are named in the description alone.

    Generated clients can't choose among them: they refuse, or send the last one's name.
    """
    content = body["content"]
    others = [
        kind
        for kind, media in content.items()
        if media.get("schema") == BYTES and kind != "application/octet-stream"
    ]
    for kind in others:
        del content[kind]
    if others:
        body.setdefault("description", f"Taken too: {', '.join(others)}.")


def _contents(operation: Json) -> Iterator[Json]:
    """By content type: the body, and each answer."""
    for entry in (operation.get("requestBody", {}), *operation["responses"].values()):
        yield entry.get("content", {})


def _drop_untyped_json(content: Json) -> None:
    """Without the JSON of any shape that FastAPI adds to answers of another content type."""
    if len(content) > 1 and content.get("application/json") == {"schema": {}}:
        del content["application/json"]


def _name_schemas(content: Json, schemas: Json) -> None:
    """An object's schema goes to the components, under its title, with those that it refers to."""
    for media in content.values():
        schema = media.get("schema", {})
        if "properties" not in schema or "title" not in schema:
            continue
        inner = schema.pop("$defs", {}) | {schema["title"]: schema}
        for name, shape in inner.items():
            _add(name, shape, schemas)
        media["schema"] = {"$ref": COMPONENTS.format(model=schema["title"])}


def _is_named(shape: Json) -> bool:
    """Whether generators make a class of it: not of lists, and not of unions."""
    return "properties" in shape or "enum" in shape or shape.get("type") == "object"


def _inlined(value: Any, nameless: Json) -> Any:
    """The schemas of `nameless` in place of references to them; none refers to itself."""
    if isinstance(value, list):
        return [_inlined(each, nameless) for each in value]
    if not isinstance(value, dict):
        return value
    name = str(value.get("$ref", "")).rpartition("/")[2]
    if name in nameless:
        return _inlined(nameless[name], nameless)
    return {key: _inlined(each, nameless) for key, each in value.items()}


def _one_spelling(value: Any) -> Any:
    """Of members of an enum that differ in case alone the first: generators name them alike."""
    if isinstance(value, list):
        return [_one_spelling(each) for each in value]
    if not isinstance(value, dict):
        return value
    spelt = {key: _one_spelling(each) for key, each in value.items()}
    if isinstance(spelt.get("enum"), list):
        first = {str(member).lower(): member for member in reversed(spelt["enum"])}
        spelt["enum"] = [member for member in spelt["enum"] if member in first.values()]
    members = [each for one in (spelt, *spelt.get("anyOf", ())) for each in one.get("enum", ())]
    alike = (each for each in members if str(each).lower() == str(spelt.get("default")).lower())
    return (
        spelt | {"default": next(alike, spelt["default"])}
        if members and "default" in spelt
        else spelt
    )


def _with_nulls(value: Any) -> Any:
    """The nulls of examples, which FastAPI would have left out."""
    if isinstance(value, dict):
        return {key: _with_nulls(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_nulls(each) for each in value]
    return None if value == NULL else value


def _add(name: str, schema: Json, schemas: Json) -> None:
    """Raises ValueError where two unlike schemas have the same name."""
    if schemas.setdefault(name, schema) != schema:
        raise ValueError(f"two schemas of the OpenAPI document are called {name}")
