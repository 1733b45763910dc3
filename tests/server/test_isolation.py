"""A key limited to `acme/*` sees and touches its own adapters alone, through every route."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from adapter_client import OCTETS
from bad_files import set_bytes
from conftest import Serve, Served

from adapters.names import BASE
from server.import_root import ImportRoot
from server.keys import Key, new_key
from server.routes.openai import as_reference

OWN, THEIRS, NOBODYS = "acme/tone", "zeta/tone", "zeta/none"
# The other tenant's words: none may be in what the key is answered
SECRETS = re.compile(r"zeta|secret-alias|secret-label|tenant-b")
# What differs between two equal requests by time alone, or counts the key's own requests
_CLOCKS = "id|created|request_id|last_used|requests|tokenize|queue|forward|total"
CLOCKS = re.compile(rf'"({_CLOCKS})":("[^"]*"|[0-9.e-]+|null)')
OWN_HEADERS = {"x-request-id", "date", "x-compute-time", "content-length"}


def _rerank(reference: str) -> Any:
    return {"model": reference, "query": "to be", "documents": ["or", "not"]}


def _texts(reference: str) -> Any:
    return {"adapter": reference, "inputs": "to be"}


# Of every inference route: a body that names an adapter, or one that can name none.
BODIES: dict[str, Callable[[str], Any]] = {
    "/encode": _texts,
    "/critic": _texts,
    "/classify": _texts,
    "/tokenize": lambda _: {"inputs": "to be"},
    "/detokenize": lambda _: {"ids": [20, 21]},
    "/v1/embeddings": lambda reference: {"model": reference, "input": "to be"},
    "/rerank": _rerank,
    "/v1/rerank": _rerank,
    "/v2/rerank": _rerank,
    "/embed": _texts,
    "/embed_all": _texts,
    "/predict": _texts,
    "/": _texts,
    "/similarity": lambda reference: {
        "adapter": reference,
        "inputs": {"source_sentence": "to be", "sentences": ["or not"]},
    },
}
NAMES_NONE = {"/tokenize", "/detokenize"}
# Of every route without an adapter in its path: what the key reads there.
READS: dict[str, tuple[str, ...]] = {
    "/health": ("/health",),
    "/ready": ("/ready",),
    "/openapi.json": (),  # the same for everybody
    "/info": ("/info", f"/as/{OWN}/-/info"),
    "/metrics": ("/metrics",),
    "/debug/engine": ("/debug/engine",),
    "/adapters": tuple(
        f"/adapters?{query}"
        for query in (
            *(f"sort={s}&order={o}" for s in ("name", "used", "bytes") for o in ("asc", "desc")),
            *("q=tone", "q=secret-alias", "after=zeta/a&order=desc", "after=acme/z", "limit=1"),
        )
    ),
    "/diff": (f"/diff?a={OWN}&b={OWN}@1",),
    "/v1/models": ("/v1/models", f"/as/{OWN}/-/v1/models"),
    "/v1/models/{model}": (f"/v1/models/{OWN}", "/v1/models/base"),
}
# Of every such route that names an adapter nevertheless: with the name of another tenant's.
FOREIGN_READS = (
    *("/diff?a={name}&b=acme/tone", "/diff?a=acme/tone&b={name}@1", "/v1/models/{name}"),
    *("/as/{name}/-/v1/models", "/as/{name}/-/info", "/v1/models/{name}@secret-alias"),
)
WRITES: dict[str, Callable[[str], Any]] = {
    "/v1/load_lora_adapter": lambda name: {"lora_name": name, "lora_path": f"{OWN}.safetensors"},
    "/v1/unload_lora_adapter": lambda name: {"lora_name": name},
}


@dataclass(frozen=True)
class Tenants:
    """A server with keys of two tenants and of its operator, each as a client."""

    served: Served
    acme: httpx.Client
    zeta: httpx.Client
    root: httpx.Client
    acme_key: Key
    zeta_key: Key
    folder: Path  # the import root
    file: Callable[[int], bytes]


@pytest.fixture(scope="module")
def tenants(
    tiny_backbone: Path, serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tenants]:
    base = tmp_path_factory.mktemp("tenants")
    scopes = frozenset({"infer", "admin", "metrics"})
    acme, acme_secret = new_key(base / "keys.json", "tenant-a", scopes=scopes, adapters=["acme/*"])
    zeta, zeta_secret = new_key(base / "keys.json", "tenant-b", scopes=scopes, adapters=["zeta/*"])
    _, root_secret = new_key(base / "keys.json", "operator", scopes=scopes)
    folder = base / "import"
    for space in ("acme", "zeta"):
        (folder / space).mkdir(parents=True)
    served = serve_for_session(
        *(tiny_backbone, "--dtype", "float32", "--keys", base / "keys.json"),
        *("--import-root", folder),
    )
    clients = [
        served.client(headers={"authorization": f"Bearer {secret}"})
        for secret in (acme_secret, zeta_secret, root_secret)
    ]
    digest = clients[2].get("/info").json()["backbone"]["digest"]
    (folder / f"{OWN}.safetensors").write_bytes(set_bytes(digest, seed=1))
    (folder / f"{THEIRS}.safetensors").write_bytes(set_bytes(digest, seed=2))
    yield Tenants(served, *clients, acme, zeta, folder, lambda seed: set_bytes(digest, seed=seed))
    for client in clients:
        client.close()


def put(client: httpx.Client, name: str, content: bytes) -> httpx.Response:
    return client.put(f"/adapters/{name}", content=content, headers=OCTETS)


def seen(answer: httpx.Response) -> tuple[int, Any, str]:
    """All that an answer tells, but for the time and the request's own id."""
    headers = {k: v for k, v in answer.headers.items() if k not in OWN_HEADERS}
    headers.pop("x-trunkline-metadata", None)
    text = CLOCKS.sub(r'"\1":_', answer.text)
    if answer.request.url.path == "/metrics":  # the key's own requests go on
        text = "\n".join(line for line in text.splitlines() if "key_re" not in line)
    return answer.status_code, headers, text


def operations(client: httpx.Client) -> list[tuple[str, str]]:
    paths = client.get("/openapi.json").json()["paths"]
    return [(method, path) for path, methods in paths.items() for method in methods]


def answers_to_own(tenants: Tenants) -> dict[str, tuple[int, Any, str]]:
    """What the key of acme is answered about its own adapters and about the server."""
    client = tenants.acme
    told: dict[str, httpx.Response] = {}
    for path, body in BODIES.items():
        told[f"POST {path}"] = client.post(path, json=body(OWN))
        told[f"POST /as/ {path}"] = client.post(f"/as/{OWN}/-{path}", json=body(OWN))
    told["PUT"] = put(client, OWN, tenants.file(1))
    told["PUT alias"] = client.put(f"/adapters/{OWN}/aliases/lost", json={"version": 9})
    told["DELETE"] = client.delete("/adapters/acme/none")
    for path in (f"/adapters/{OWN}{rest}" for rest in ("", "/file", "/versions/1")):
        told[path] = client.get(path)
    for paths in READS.values():
        told |= {path: client.get(path) for path in paths}
    return {name: seen(answer) for name, answer in told.items()}


def live(tenants: Tenants) -> None:
    """The other tenant: the same bytes, others, aliases, answers, loads, pins, errors, imports."""
    client = tenants.zeta
    assert put(client, THEIRS, tenants.file(1)).status_code == 201  # acme's very bytes
    for seed in (2, 3):
        assert put(client, f"zeta/own-{seed}", tenants.file(seed)).status_code == 201
    done = client.put(f"/adapters/{THEIRS}/aliases/secret-alias", json={"version": 1})
    assert done.status_code == 200
    for _ in range(3):
        client.post("/encode", json=_texts(THEIRS)).raise_for_status()
    for action in ("load", "pin", "unpin", "unload", "pin", "verify"):
        client.post(f"/adapters/zeta/own-2/{action}").raise_for_status()
    assert client.post("/encode", json=_texts(NOBODYS)).status_code == 404
    body = {"lora_name": "zeta/imported", "lora_path": f"{THEIRS}.safetensors"}
    client.post("/v1/load_lora_adapter", json=body).raise_for_status()


def test_every_route_of_the_document_is_in_the_walk(tenants: Tenants) -> None:
    for method, path in operations(tenants.root):
        known = {"post": BODIES.keys() | WRITES.keys(), "get": READS.keys()}.get(method, set())
        assert "{name}" in path or path in known, f"{method} {path}: say what a limited key sees"


def test_what_another_tenant_does_changes_no_answer_of_a_limited_key(tenants: Tenants) -> None:
    assert put(tenants.acme, OWN, tenants.file(1)).status_code in (200, 201)
    tenants.acme.post("/encode", json=_texts(OWN)).raise_for_status()
    before = answers_to_own(tenants)
    live(tenants)
    after = answers_to_own(tenants)
    rows = re.compile(r"(trunkline_\w+_(rows|tokens)_total{[^}]*}) \S+")
    for name, (status, headers, text) in before.items():
        then = after[name]
        assert then[:2] == (status, headers), name
        assert rows.sub(r"\1", then[2]) == rows.sub(r"\1", text), name  # they grow by acme's own
    assert not [name for name, told in after.items() if SECRETS.search(repr(told))]


def test_the_names_of_others_are_refused_alike_whether_they_exist_or_not(tenants: Tenants) -> None:
    put(tenants.zeta, THEIRS, tenants.file(1))
    client = tenants.acme

    def asked(name: str) -> dict[str, httpx.Response]:
        told = {}
        for method, template in operations(client):
            if "{name}" in template:
                path = template.replace("{name}", name)
                path = path.replace("{number}", "1").replace("{alias}", "secret-alias")
                told[f"{method} {template}"] = client.request(method, path, content=b"x")
                if method == "get":
                    told[f"head {template}"] = client.head(path)
        for path, body in (BODIES | WRITES).items():
            if path not in NAMES_NONE:
                told[path] = client.post(path, json=body(name))
                told[f"{path}@1"] = client.post(path, json=body(f"{name}@1"))
            if path in BODIES and path not in NAMES_NONE:
                told[f"/as/ {path}"] = client.post(f"/as/{name}/-{path}", json=body(name))
        told |= {path: client.get(path.replace("{name}", name)) for path in FOREIGN_READS}
        return told

    exists, missing = asked(THEIRS), asked(NOBODYS)
    for name, answer in exists.items():
        assert answer.status_code == (404 if "models" in name else 403), (name, answer.text)
        status, headers, text = seen(missing[name])
        assert seen(answer) == (status, headers, text.replace(NOBODYS, THEIRS)), name


def test_a_limited_key_imports_what_its_patterns_match_below_the_root(tenants: Tenants) -> None:
    root = tenants.folder
    (root / "acme/link.safetensors").symlink_to(f"../{THEIRS}.safetensors")
    (root / "acme/folder").symlink_to("../zeta")
    absolute = root / f"{THEIRS}.safetensors"
    foreign = ("zeta/tone.safetensors", "zeta/none.safetensors", "zeta", "", ".", str(absolute))
    foreign += ("acme/../zeta/tone.safetensors", "acme/link.safetensors", "acme/folder")
    told = set()
    for path in foreign:
        body = {"lora_name": "acme/stolen", "lora_path": path}
        answer = tenants.acme.post("/v1/load_lora_adapter", json=body)
        told.add((answer.status_code, answer.text))
    assert len(told) == 1, told
    assert told.pop()[0] == 403
    for path in (f"{OWN}.safetensors", str(root / f"{OWN}.safetensors")):
        body = {"lora_name": "acme/imported", "lora_path": path, "load_inplace": True}
        assert tenants.acme.post("/v1/load_lora_adapter", json=body).status_code == 200
    body = {"lora_name": "free", "lora_path": "zeta/tone.safetensors"}
    assert tenants.root.post("/v1/load_lora_adapter", json=body).status_code == 200
    tenants.root.delete("/adapters/free").raise_for_status()


def test_a_path_that_is_not_the_key_s_own_is_refused_before_the_disk_is_touched(
    tmp_path: Path,
) -> None:
    def looked(*_: Any) -> None:
        raise AssertionError("the disk was asked")

    root = ImportRoot(tmp_path, lambda name: name.startswith("acme/"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "resolve", looked)
        with pytest.raises(Exception, match="adapter patterns"):
            root.find("zeta/tone.safetensors")


def test_a_peft_folder_is_its_key_s_own_with_what_lies_in_it(tmp_path: Path) -> None:
    for space in ("acme/peft", "zeta/peft", "acme/thief"):
        (tmp_path / space).mkdir(parents=True)
        (tmp_path / space / "adapter_config.json").write_text("{}")
    for space in ("acme/peft", "zeta/peft"):
        (tmp_path / space / "adapter_model.safetensors").write_bytes(b"x")
    stolen = tmp_path / "acme/thief/adapter_model.safetensors"
    stolen.symlink_to("../../zeta/peft/adapter_model.safetensors")
    one = ImportRoot(tmp_path, lambda name: name == "acme/peft")
    assert len(one.find("acme/peft")) == 2
    acmes = ImportRoot(tmp_path, lambda name: name.startswith("acme/"))
    with pytest.raises(Exception, match="adapter patterns"):
        acmes.find("acme/thief")


def test_every_change_is_in_the_audit_with_the_key_that_made_it(tenants: Tenants) -> None:
    name, client = "acme/audited", tenants.acme
    assert put(client, name, tenants.file(4)).status_code == 201
    client.put(f"/adapters/{name}/aliases/stable", json={"version": 1}).raise_for_status()
    for action in ("pin", "unpin", "pin", "unload"):
        client.post(f"/adapters/{name}/{action}").raise_for_status()
    client.delete(f"/adapters/{name}/versions/1").raise_for_status()
    body = {"lora_name": name, "lora_path": f"{OWN}.safetensors"}
    client.post("/v1/load_lora_adapter", json=body).raise_for_status()
    client.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
    assert put(client, name, tenants.file(4)).status_code == 201
    audit = client.get(f"/adapters/{name}").json()["audit"]
    assert {"put", "point", "pin", "unpin", "delete"} <= {entry["action"] for entry in audit}
    assert len(audit) >= 9
    assert {entry["who"] for entry in audit} == {f"tenant-a {tenants.acme_key.id}"}


def test_the_backbone_s_id_can_name_no_adapter_and_always_means_the_backbone(
    tenants: Tenants,
) -> None:
    trunk = tenants.root.get("/info").json()["backbone"]["id"]
    refused = put(tenants.root, trunk, tenants.file(1))
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "name_conflict")
    body = {"lora_name": trunk, "lora_path": f"{OWN}.safetensors"}
    assert tenants.root.post("/v1/load_lora_adapter", json=body).status_code == 409
    taken = SimpleNamespace(exists=lambda name: True)  # by an adapter from before the rule
    state: Any = SimpleNamespace(
        backbone=SimpleNamespace(id=trunk), library=SimpleNamespace(registry=taken)
    )
    assert as_reference(trunk, state) == BASE


def metrics(client: httpx.Client) -> str:
    return client.get("/metrics").text


def test_metrics_tell_an_operator_of_every_key_and_a_limited_key_of_itself(
    tenants: Tenants,
) -> None:
    tenants.zeta.post("/encode", json=_texts(BASE)).raise_for_status()
    tenants.acme.post("/encode", json={"adapter": OWN, "inputs": ["to be", "or not"]})
    assert tenants.acme.get(f"/adapters/{THEIRS}").status_code == 403
    labels = f'{{key="{tenants.acme_key.id}",name="tenant-a"}}'
    everything = metrics(tenants.root)
    used = {
        what: float(re.search(rf"^trunkline_key_{what}_total{labels} (\S+)", everything, re.M)[1])
        for what in ("requests", "refusals", "rows", "tokens")
    }
    assert used["requests"] > used["refusals"] > 0
    assert used["tokens"] > used["rows"] >= 2
    assert f'key="{tenants.zeta_key.id}",name="tenant-b"' in everything
    assert re.search(
        r'^trunkline_build_info{.*backbone="tiny".*version="[\d.]+.*"} 1', everything, re.M
    )
    assert "process_resident_memory_bytes" in everything
    own = metrics(tenants.acme)
    families = set(re.findall(r"^# TYPE (\w+)", own, re.M))
    assert families == {
        *(f"trunkline_adapter_{what}_total" for what in ("rows", "tokens")),
        *(f"trunkline_key_{what}_total" for what in ("requests", "refusals", "rows", "tokens")),
        "trunkline_build_info",
    }
    assert set(re.findall(r'key="(\w+)"', own)) == {tenants.acme_key.id}
    assert set(re.findall(r'adapter="([^"]+)"', own)) <= {OWN, "acme/audited", "other"}


def test_a_limited_key_s_info_counts_its_own_and_the_engine_s_state_is_not_for_it(
    tenants: Tenants,
) -> None:
    own = len(tenants.acme.get("/adapters", params={"limit": 1000}).json()["data"])
    info = tenants.acme.get("/info").json()
    assert (info["adapters"], "slots" in info) == (own, False)
    assert tenants.root.get("/info").json()["adapters"] > own
    refused = tenants.acme.get("/debug/engine")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")


def test_a_name_in_capitals_is_its_small_letters_owner_s(tenants: Tenants) -> None:
    """A key of `[!b-z]*/*` could ask whether zeta/tone exists, by the name Zeta/tone."""
    key = tenants.acme_key.model_copy(update={"adapters": ("[!b-z]*/*",)})
    assert not key.may_use("Zeta/tone")
    assert json.loads(put(tenants.acme, "ZETA/tone", b"x").content)["error"]["code"] == "forbidden"
