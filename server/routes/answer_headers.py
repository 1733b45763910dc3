"""The headers that answers of all routes have in common, as the OpenAPI document states them."""

from typing import Any

HEADERS = {
    "RequestId": ("x-request-id", "The request's own id where it was sane, else a new one."),
    "RetryAfter": ("retry-after", "Seconds after which to ask again, where they are known."),
    "Authenticate": ("www-authenticate", "Bearer: an API key is needed."),
}
HEADERS |= {
    f"{name}{what}": (
        f"x-ratelimit-{name.lower()}-{what.lower()}",
        f"Where the key has a quota of {what.lower()}: {text}.",
    )
    for what in ("Requests", "Tokens")
    for name, text in (
        ("Limit", "all of it"),
        ("Remaining", "what is left"),
        ("Reset", "when all of it is there again, as 120ms, 1s, 6m0s or 1h0m0s"),
    )
}
LIMITS = tuple(name for name, (header, _) in HEADERS.items() if header.startswith("x-ratelimit"))


def header_components() -> dict[str, Any]:
    """The document's `components/headers`."""
    return {
        name: {"description": text, "schema": {"type": "string"}}
        for name, (_, text) in HEADERS.items()
    }


def add_headers(status: int, response: dict[str, Any], keyed: bool) -> None:
    """Refer to those that an answer with this status has; `keyed` routes ask for a key."""
    names = ["RequestId"]
    if status in (429, 503):
        names.append("RetryAfter")
    if status == 401:
        names.append("Authenticate")
    if keyed and (status < 300 or status == 429):
        names += LIMITS
    headers = response.setdefault("headers", {})
    for name in names:
        headers[HEADERS[name][0]] = {"$ref": f"#/components/headers/{name}"}
