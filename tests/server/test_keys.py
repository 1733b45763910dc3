"""Keys, scopes and quotas: refused before the body, stored hashed, reloaded, closed once keyed."""

import json
import re
import socket
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
import pytest
from adapter_client import wait_until
from click.testing import CliRunner
from conftest import Serve, Served, start_server

from server.cli import main
from server.guard import PUBLIC, is_public, needed
from server.keys import BadKeys, Bucket, KeyRing, Quota, new_key, read_keys, revoke_key
from server.rate_headers import duration

BODY = {"adapter": "plain", "inputs": "abc"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def make(file: Path, *options: str) -> dict[str, str]:
    """The header of a new key, made by the command."""
    done = CliRunner().invoke(main, ["keys", "--file", str(file), "new", *options])
    assert done.exit_code == 0, done.output
    return {"authorization": f"Bearer {done.stdout.strip()}"}


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the shared server, to which a test adds the keys that it needs."""
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def keyed(
    tiny_backbone: Path, serve_for_session: Serve, ring: Path
) -> tuple[Served, dict[str, str]]:
    """A server with one admin key, and that key's header."""
    admin = make(ring, "--scope", "admin", "--name", "root")
    return serve_for_session(tiny_backbone, "--dtype", "float32", "--keys", ring), admin


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_without_a_key_nothing_but_health_and_documents_is_answered(
    keyed: tuple[Served, dict[str, str]],
) -> None:
    with keyed[0].client() as client:
        for path in ("/health", "/ready", "/openapi.json"):
            assert client.get(path).status_code == 200
        for path in ("/adapters", "/info", "/metrics", "/v1/models", "/no/such/path"):
            answer = client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert code(client.post("/encode", json=BODY)) == (401, "unauthorized")
        for wrong in ("", "tl_", "tl_000000000000_x", "x" * 9000, "é"):
            answer = client.post("/encode", json=BODY, headers={"x-api-key": wrong.encode()})
            assert code(answer) == (401, "unauthorized")


def test_a_scope_allows_its_routes_only_and_a_mistyped_path_is_404(
    keyed: tuple[Served, dict[str, str]], ring: Path
) -> None:
    served, admin = keyed
    infer, metrics = make(ring), make(ring, "--scope", "metrics")
    with served.client() as client:
        wait_until(lambda: client.get("/info", headers=infer).status_code == 200)
        assert client.post("/encode", json=BODY, headers=infer).status_code == 200
        assert client.get("/adapters", headers=infer).status_code == 200
        assert code(client.post("/adapters/plain/pin", headers=infer)) == (403, "forbidden")
        refused = client.get("/metrics", headers=infer)
        assert code(refused) == (403, "forbidden")
        assert "admin or metrics" in refused.json()["error"]["message"]
        for key in (infer, metrics, admin):
            assert code(client.get("/no/such/path", headers=key)) == (404, "not_found")
            assert code(client.post("/encod", headers=key)) == (404, "not_found")
            wrong = client.put("/encode", headers=key)
            assert code(wrong) == (405, "method_not_allowed")
            assert wrong.headers["allow"] == "POST"
            assert wrong.json()["error"]["message"] == "this route takes POST only"
            assert client.delete("/", headers=key).headers["allow"] == "GET, HEAD, POST"
        assert client.get("/metrics", headers=metrics).status_code == 200
        assert code(client.get("/debug/engine", headers=infer)) == (403, "forbidden")
        assert client.get("/debug/engine", headers=admin).json()["leases"] == 0
        for path in ("/adapters", "/diff?a=plain&b=full"):
            assert client.get(path, headers=infer).status_code == 200
            assert code(client.get(path, headers=metrics)) == (403, "forbidden")
        assert client.get("/no/such/path", headers=admin).status_code == 404
        assert client.get("/adapters/plain/file", headers=admin).status_code == 200
        for end in ("", "/", "%0A", "/%0A", "%0A/", "%0D", "%20", "%2F"):  # weights are an admin's
            answer = client.get(f"/adapters/plain/file{end}", headers=infer)
            assert answer.status_code in (403, 422), end
            assert answer.headers["content-type"] == "application/json"
        assert code(client.post("/encode", json=BODY, headers=admin)) == (403, "forbidden")


def test_a_key_uses_the_adapters_of_its_patterns_only(
    keyed: tuple[Served, dict[str, str]], ring: Path
) -> None:
    served, admin = keyed
    own = make(ring, "--adapters", "pl*", "--scope", "infer", "--scope", "admin")
    with served.client() as client:
        wait_until(lambda: client.get("/info", headers=own).status_code == 200)
        for reference in ("plain", "plain@1", None, "base"):
            answer = client.post("/encode", json=BODY | {"adapter": reference}, headers=own)
            assert answer.status_code == 200
        body = {"adapters": ["plain", "full"], "inputs": "abc"}
        refused = client.post("/encode", json=body, headers=own)
        assert code(refused) == (403, "forbidden")
        assert refused.json()["error"]["details"]["adapter"] == "full"
        assert [row["name"] for row in client.get("/adapters", headers=own).json()["data"]] == [
            "plain"
        ]
        models = client.get("/v1/models", headers=own).json()["data"]
        assert "full" not in [model["id"] for model in models]
        for method, path in (("GET", "full"), ("POST", "full/pin"), ("DELETE", "full")):
            answer = client.request(method, f"/adapters/{path}", headers=own)
            assert code(answer) == (403, "forbidden")
        for pair in ({"a": "plain", "b": "full@1"}, {"a": "full", "b": "plain"}):
            assert code(client.get("/diff", params=pair, headers=own)) == (403, "forbidden")
        pair = {"a": "plain", "b": "plain@1"}
        assert client.get("/diff", params=pair, headers=own).status_code == 200
        for lora in ("load", "unload"):
            body = {"lora_name": "full"} | ({"lora_path": "x"} if lora == "load" else {})
            answer = client.post(f"/v1/{lora}_lora_adapter", json=body, headers=own)
            assert code(answer) == (403, "forbidden")
        assert client.get("/adapters/full", headers=admin).status_code == 200
        assert client.post("/adapters/plain/pin", headers=own).status_code == 200
        audit = client.get("/adapters/plain", headers=own).json()["audit"]
        identity = own["authorization"].split("_")[1]
        assert any(identity in entry["who"] for entry in audit), audit


def test_a_key_s_pages_are_full_of_its_own_adapters_and_name_no_others(
    keyed: tuple[Served, dict[str, str]], ring: Path, tiny_backbone: Path
) -> None:
    served, admin = keyed
    content = (tiny_backbone / "adapters" / "plain.safetensors").read_bytes()
    kind = {"content-type": "application/octet-stream"}
    mine, theirs = ([f"{space}/{n}" for n in range(5)] for space in ("acme", "zeta"))
    with served.client(headers=admin) as client:
        for name in (*mine, *theirs):
            assert client.put(f"/adapters/{name}", content=content, headers=kind).status_code == 201
    own = make(ring, "--adapters", "[!b-z]*/?", "--adapters", "zeta/[34]")
    seen, after = [], ""
    with served.client(headers=own) as client:
        wait_until(lambda: client.get("/info").status_code == 200)
        while after is not None:
            page = client.get("/adapters", params={"limit": 3, "after": after}).json()
            names = [row["name"] for row in page["data"]]
            assert len(names) == 3 or page["next"] is None
            assert page["next"] in (None, names[-1])
            seen, after = seen + names, page["next"]
    patterns = ("[!b-z]*/?", "zeta/[34]")
    assert seen == [n for n in (*mine, *theirs) if any(fnmatchcase(n, p) for p in patterns)]


def test_a_used_up_quota_is_429_with_the_time_to_wait(
    keyed: tuple[Served, dict[str, str]], ring: Path
) -> None:
    served, _ = keyed
    requests, tokens = make(ring, "--quota", "3/h"), make(ring, "--token-quota", "5/h")
    with served.client() as client:
        wait_until(lambda: client.get("/info", headers=tokens).status_code == 200)
        for _ in range(3):
            assert client.post("/encode", json=BODY, headers=requests).status_code == 200
        answer = client.post("/encode", json=BODY, headers=requests)
        assert code(answer) == (429, "quota_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 1200
        details = answer.json()["error"]["details"]
        assert (details["quota"], details["limit"]) == ("requests", "3/h")
        assert details["key"]["id"] == requests["authorization"].split("_")[1]
        for status in (200, 200, 429):  # 3 tokens of 5, then one request overdraws
            assert client.post("/encode", json=BODY, headers=tokens).status_code == status


def test_answers_to_a_key_with_quotas_say_what_is_left_by_openai_s_names(
    keyed: tuple[Served, dict[str, str]], ring: Path
) -> None:
    served, admin = keyed
    own = make(ring, "--quota", "3/h", "--token-quota", "60/h", "--scope", "infer")
    with served.client(headers=own) as client:
        wait_until(lambda: client.get("/nowhere").status_code != 401)
        told = []
        for _ in range(4):
            answer = client.post("/encode", json=BODY)
            told.append((answer.status_code, int(answer.headers["x-ratelimit-remaining-requests"])))
            assert answer.headers["x-ratelimit-limit-requests"] == "3"
            assert answer.headers["x-ratelimit-limit-tokens"] == "60"
            assert re.fullmatch(r"\d+m\d+s|1h0m0s", answer.headers["x-ratelimit-reset-requests"])
        assert told == [(200, 2), (200, 1), (200, 0), (429, 0)]
        assert 1 <= int(answer.headers["retry-after"]) <= 1200
        assert answer.headers["x-ratelimit-remaining-tokens"] == "51"  # three texts of 3
        assert re.fullmatch(r"[89]m\d+s", answer.headers["x-ratelimit-reset-tokens"])
    with served.client(headers=admin) as client:
        assert not [name for name in client.get("/adapters").headers if "ratelimit" in name]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0s"), (0.0004, "1ms"), (0.12, "120ms"), (1, "1s"), (1.2, "2s"), (59.5, "1m0s")),
        *((360, "6m0s"), (3600, "1h0m0s"), (7325, "2h2m5s")),
    ],
)
def test_a_reset_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_pattern_that_matches_more_than_a_namespace_is_warned_of(file: Path) -> None:
    def warned(*patterns: str) -> str:
        options = [word for pattern in patterns for word in ("--adapters", pattern)]
        done = CliRunner().invoke(main, ["keys", "--file", str(file), "new", *options])
        assert done.exit_code == 0
        assert done.stdout.startswith("tl_")
        return done.stderr

    assert "acme-other/x too; acme/* is the namespace acme alone" in warned("acme*")
    assert "acme/to-other too" in warned("acme/to*")
    for pattern in ("acme/*", "acme", "*/tone", "*", "acme/tone", "acme/[ab]"):
        assert "warning" not in warned(pattern), pattern


def test_a_refused_request_costs_no_tokens(
    keyed: tuple[Served, dict[str, str]], ring: Path
) -> None:
    few = make(ring, "--scope", "infer", "--token-quota", "10/h")
    ids = [20] * 10
    with keyed[0].client(headers=few) as client:
        wait_until(lambda: client.get("/adapters").status_code == 200)
        for _ in range(3):
            body = {"adapter": "no-such-adapter", "inputs": ids}
            assert code(client.post("/encode", json=body)) == (404, "adapter_not_found")
        assert client.post("/encode", json={"inputs": [*ids, 20]}).status_code == 200
        assert code(client.post("/encode", json={"inputs": ids})) == (429, "quota_exceeded")


def test_who_waits_as_told_has_quota_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("server.keys.time.monotonic", lambda: now[0])
    bucket = Bucket(Quota.parse("10/m"))
    bucket.take(25)
    wait = bucket.wait_s(1)
    now[0] += wait - 1
    assert bucket.wait_s(1) == 1
    now[0] += 1
    assert bucket.wait_s(1) == 0


def test_a_revoked_key_ends_without_a_restart_and_the_server_stays_closed(
    tiny_backbone: Path, serve: Serve, file: Path
) -> None:
    """On a server of its own: its file breaks, and is lost."""
    admin = make(file, "--scope", "admin")
    served = serve(tiny_backbone, "--dtype", "float32", "--keys", file)
    identity = admin["authorization"].split("_")[1]
    with served.client() as client:
        assert client.get("/adapters", headers=admin).status_code == 200
        file.write_text("not a list")
        pause = [client.get("/adapters", headers=admin).status_code for _ in range(20)]
        assert set(pause) == {200}  # a broken file changes nothing
    file.unlink()
    revoked = make(file)["authorization"].split("_")[1]
    CliRunner().invoke(main, ["keys", "--file", str(file), "revoke", revoked])
    with served.client() as client:
        wait_until(lambda: client.get("/adapters", headers=admin).status_code == 401)
        assert client.get("/adapters").status_code == 401
    assert identity not in file.read_text()


def test_a_body_is_not_read_without_a_key(keyed: tuple[Served, dict[str, str]]) -> None:
    host, port = keyed[0].url.removeprefix("http://").split(":")
    head = b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head + b"content-length: 8000000\r\n\r\n")
        received = b""
        while part := connection.recv(65536):  # until the server closes
            received += part
    assert received.startswith(b"HTTP/1.1 401")
    assert len(received) < 4096


def bytes_read(served: Served) -> int:
    """By the process, of files and sockets, since it began."""
    counts = Path(f"/proc/{served.process.pid}/io").read_text()
    return int(re.search(r"rchar: (\d+)", counts)[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads as Linux tells them")
def test_at_most_16_kib_of_a_body_without_a_key_are_read(
    tiny_backbone: Path, serve: Serve, file: Path
) -> None:
    """On a server of its own, whose file of keys isn't read again meanwhile: that would count."""
    make(file)
    served = serve(tiny_backbone, "--dtype", "float32", "--keys", file)
    host, port = served.url.removeprefix("http://").split(":")
    head = b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    received = []
    before = bytes_read(served)
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head + b"content-length: 1000000\r\n\r\n" + b" " * 60_000)
            received.append(connection.recv(65536))
    assert all(answer.startswith(b"HTTP/1.1 401") for answer in received)
    assert all(len(answer) < 4096 for answer in received)
    assert bytes_read(served) - before <= 20 * (16 << 10)


@pytest.mark.parametrize("asked", ["PUT /adapters/a", "DELETE /adapters/a", "GET /debug/engine"])
def test_changes_are_an_admin_s(asked: str) -> None:
    assert needed(*asked.split()) == {"admin"}


@pytest.mark.parametrize("path", ["/encode/", "/encode\n", "/Encode", "//encode", "/v1/x"])
def test_what_has_no_rule_is_nobody_s(path: str) -> None:
    assert needed("POST", path) is None


def test_every_route_of_the_document_is_public_or_has_a_rule(tiny_server: Served) -> None:
    with tiny_server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        example = re.sub(r"{name}", "acme/tone", re.sub(r"{number}", "1", path))
        example = re.sub(r"{\w+}", "stable", example)
        for method in operations:
            known = needed(method.upper(), example) is not None
            assert known or is_public(method.upper(), path), f"{method} {path} needs a rule"


def test_a_line_end_behind_a_path_gives_no_other_scope(
    keyed: tuple[Served, dict[str, str]],
) -> None:
    """Starlette's router passes over it, so the guard must not take the path for another one."""
    with keyed[0].client() as client:
        document = client.get("/openapi.json").json()
    checked = 0
    for template, operations in document["paths"].items():
        if template.endswith("}"):
            continue  # the line end belongs to the name, which is refused
        path = re.sub("{[a-z]+}", "x", template)
        for method in {"get", "put", "post", "delete"} & operations.keys():
            scopes = needed(method.upper(), path)
            assert needed(method.upper(), path + "\n") in (None, scopes), (method, path)
            checked += 1
    assert checked > 20


def test_only_reading_is_public() -> None:
    for path in (*PUBLIC, "/static-offline-docs/swagger-ui.css"):
        assert is_public("GET", path)
        assert not is_public("POST", path)


def test_a_public_address_without_keys_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not loopback and no API keys"):
        start_server(tmp_path / "log", tiny_backbone, "--host", "0.0.0.0")


def test_the_file_has_no_secret_and_is_its_owner_s_alone(file: Path) -> None:
    key, secret = new_key(file, "a", scopes={"infer"})
    assert secret not in file.read_text()
    assert secret.split("_", 2)[2] not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    ring = KeyRing(file)
    caller = ring.caller(secret.encode())
    assert caller is not None
    assert caller.key == key
    assert ring.caller(secret[:-1].encode()) is None
    revoke_key(file, key.id)
    assert KeyRing(file).caller(secret.encode()) is None
    assert KeyRing(file).configured
    with pytest.raises(BadKeys, match="no live key"):
        revoke_key(file, key.id)


def listed(file: Path, command: str = "ls") -> str:
    words = ["keys", "--file", str(file), command]
    done = CliRunner().invoke(main, words, env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_ls_shows_every_key_under_a_header_and_no_hash(file: Path) -> None:
    assert listed(file) == f"no keys in {file}\n"
    make(file, "--name", "ci \x1b[31m[red]", "--quota", "100/s", "--adapters", "acme/*")
    make(file, "--name", "ops", "--scope", "admin", "--scope", "metrics")
    live, revoked = read_keys(file)
    revoke_key(file, revoked.id)
    header, _, first, second = listed(file).splitlines()
    assert header.split() == ["Id", "State", "Scopes", "Adapters", "Requests", "Tokens", "Name"]
    assert first.split() == [live.id, "live", "infer", "acme/*", "100/s", "-", "ci", "�[31m[red]"]
    assert second.split() == [revoked.id, "revoked", "admin,metrics", "*", "-", "-", "ops"]
    assert first.index("acme/*") == second.index("*") == header.index("Adapters")
    assert live.sha256 not in listed(file)


def test_list_is_another_name_of_ls(file: Path) -> None:
    make(file)
    assert listed(file, "list") == listed(file, "ls")


def test_a_broken_file_is_a_sentence(file: Path) -> None:
    file.write_text(json.dumps([{"id": 1}]))
    with pytest.raises(BadKeys, match="not a list of keys"):
        KeyRing(file)


@pytest.mark.parametrize("text", ["", "0/s", "5", "5/d", "-1/s", "1.5/s", "5/s "])
def test_a_wrong_quota_is_a_sentence(text: str) -> None:
    with pytest.raises(BadKeys, match="no quota"):
        Quota.parse(text)


def test_a_bucket_tells_how_long_until_there_is_enough() -> None:
    bucket = Bucket(Quota.parse("60/h"))
    assert bucket.wait_s(60) == 0
    bucket.take(60)
    assert bucket.wait_s(1) == 60
    assert bucket.wait_s(2) == 120


def test_the_openapi_document_asks_for_a_key_where_the_guard_does(tiny_server: Served) -> None:
    with tiny_server.client() as client:
        document = client.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            public = is_public(method.upper(), path)
            wanted = [] if public else [*({scheme: []} for scheme in schemes), {}]
            assert operation.get("security", []) == wanted, path


def test_a_keys_file_that_is_named_and_not_there_starts_no_server(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    arguments = ["serve", str(tiny_backbone), "--data", str(tmp_path / "data")]
    typo = tmp_path / "kyes.json"
    done = CliRunner().invoke(main, [*arguments, "--keys", str(typo), "--port", "0"])
    assert done.exit_code == 1
    assert f"{typo} is not there" in done.output


@pytest.mark.parametrize("pattern", ["", "ACME/*", "a b", "ü*"])
def test_a_pattern_that_no_name_matches_makes_no_key(file: Path, pattern: str) -> None:
    arguments = ["keys", "--file", str(file), "new", "--adapters", pattern]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "matches no adapter" in done.output
    assert not file.exists()


def test_the_start_tells_of_keys(keyed: tuple[Served, dict[str, str]], ring: Path) -> None:
    told = keyed[0].log.read_text()
    assert f"API keys: {ring}" in told
    assert "authorization: Bearer KEY" in told
