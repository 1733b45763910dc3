"""Brings the wanted adapters onto the server before the load, and learns what is there."""

from collections.abc import Callable, Sequence
from typing import Any

import httpx

from loadtest.adapter_file import AdapterMaker
from loadtest.catalogue import Catalogue, Entry
from loadtest.questions import KINDS
from loadtest.workload import PASSAGE

OCTETS = {"content-type": "application/octet-stream"}
VERSIONS = 2  # of a made adapter, so that there is something to promote and to roll back to


class LoadError(Exception):
    """The load can't begin, with the sentence for it."""


def open_client(url: str, key: str | None) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=120)


def ask(client: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
    """Raises LoadError for anything but success."""
    try:
        response = client.request(method, path, **options)
    except httpx.HTTPError as error:
        raise LoadError(f"{client.base_url} can't be reached: {error}") from error
    if not response.is_success:
        raise LoadError(f"{method} {path}: {response.status_code} {response.text[:300]}")
    body: dict[str, Any] = response.json()
    return body


def seed_of(seed: int, index: int, version: int) -> int:
    return (seed * 1_000_003 + index) * 1_009 + version


def populate(
    client: httpx.Client,
    maker: AdapterMaker,
    prefix: str,
    count: int,
    seed: int,
    said: Callable[[str], None],
) -> Catalogue:
    """`count` adapters PREFIX00000... of two versions each, the first one current."""
    catalogue = Catalogue()
    for index in range(count):
        name = f"{prefix}{index:05}"
        versions = {}
        for version in reversed(range(1, VERSIONS + 1)):  # the first is pushed last: it is current
            file = maker.file(seed_of(seed, index, version))
            entry = ask(client, "PUT", f"/adapters/{name}", content=file, headers=OCTETS)
            versions[entry["version"]] = entry["digest"]
        catalogue.add(Entry(name, versions, frozenset(KINDS)))
        if index % 100 == 99:
            said(f"{index + 1} of {count} adapters pushed")
    return catalogue


def existing(client: httpx.Client, names: Sequence[str]) -> Catalogue:
    """Adapters that the server has already; nothing is pushed, none is moved by others."""
    catalogue = Catalogue()
    base_has_critic = ask(client, "GET", "/info")["backbone"]["heads"]["critic"]
    for name in names:
        adapter = ask(client, "GET", f"/adapters/{name}")
        versions = {v["version"]: v["digest"] for v in adapter["versions"]}
        applied = [v["applied"] for v in adapter["versions"]]
        kinds = {"encode", "fan-out", "openai"}
        if base_has_critic or all(a["critic"] for a in applied):
            kinds.add("critic")
        if all(a["classifier"] for a in applied):
            kinds.add("classify")
        catalogue.add(Entry(name, versions, frozenset(kinds)))
    return catalogue


def current_digests(client: httpx.Client, catalogue: Catalogue) -> dict[str, str]:
    """What each name means now."""
    current: dict[str, str] = {}
    after: str | None = ""
    while after is not None:
        page = ask(client, "GET", "/adapters", params={"limit": 1000, "after": after})
        rows = (row for row in page["data"] if row["name"] in catalogue.entries)
        current |= {row["name"]: row["digest"] for row in rows}
        after = page["next"]
    return current


def passage_spans(client: httpx.Client) -> list[tuple[int, int]] | None:
    """Where the passage's tokens begin and end; None where the vocabulary can't write it."""
    response = client.post("/tokenize", json={"inputs": PASSAGE})
    if response.status_code == 422:
        return None
    if not response.is_success:
        raise LoadError(f"POST /tokenize: {response.status_code} {response.text[:300]}")
    tokens = response.json()["data"][0]["tokens"]
    return [(token["start"], token["end"]) for token in tokens if token["end"] > token["start"]]


def remove(client: httpx.Client, catalogue: Catalogue) -> None:
    for name in catalogue.entries:
        client.delete(f"/adapters/{name}")
