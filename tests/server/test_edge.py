"""What stands before the routes: paths, HEAD, proxies, CORS, and a unix socket."""

import dataclasses
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from shutil import which

import httpx
import pytest
from adapter_client import OCTETS, wait_until
from click.testing import CliRunner
from conftest import TINY, Serve, Served, random_gpt

from model.checkpoint import backbone_tensors, write_backbone
from model.tokenizer import Tokenizer
from server.cli import main
from server.cli.banner import _curl_address
from server.cli.listener import listen, url_of
from server.cors import Cors
from server.paths import routed
from server.proxies import Proxies
from server.settings import BadSettings, load_settings

BODY = {"adapter": "plain", "inputs": "abc"}
ORIGIN = "https://page.example"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    file = tmp_path_factory.mktemp("edge") / "keys.json"
    scopes = ["--scope", "infer", "--scope", "admin", "--scope", "metrics"]
    done = CliRunner().invoke(main, ["keys", "--file", str(file), "new", *scopes])
    return file, {"authorization": f"Bearer {done.stdout.strip()}"}


@pytest.fixture(scope="module")
def behind(
    tiny_backbone: Path, serve_for_session: Serve, keys: tuple[Path, dict[str, str]]
) -> Served:
    """A keyed server behind a trusted proxy, which shows it at /llm, to pages of ORIGIN."""
    options = ["--root-path", "/llm/", "--trusted-proxies", "127.0.0.0/8", "--keys", keys[0]]
    return serve_for_session(
        tiny_backbone, "--dtype", "float32", "--cors-origins", ORIGIN, *options
    )


@pytest.fixture
def client(behind: Served, keys: tuple[Path, dict[str, str]]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=behind.url, headers=keys[1], timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "/"),
        ("/encode", "/encode"),
        ("/encode/", "/encode"),
        ("/encode//", "/encode/"),
        ("/llm", "/"),
        ("/llm/", "/"),
        ("/llm/encode/", "/encode"),
        ("/llmx/encode", "/llmx/encode"),
        ("/adapters/acme/tone/", "/adapters/acme/tone"),
        ("/x/llm/encode", "/x/llm/encode"),
    ],
)
def test_a_path_is_routed_without_prefix_and_trailing_slash(path: str, expected: str) -> None:
    assert routed(path, "/llm") == expected


@pytest.mark.parametrize("prefix", ["", "/llm"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_both_paths_answer_without_a_redirect(
    client: httpx.Client, prefix: str, slash: str
) -> None:
    assert client.post(f"{prefix}/encode{slash}", json=BODY).status_code == 200
    for path in ("/adapters", "/adapters/plain", "/v1/models", "/docs", "/info", "/ready"):
        answer = client.get(f"{prefix}{path}{slash}")
        assert answer.status_code == 200, path
    refused = httpx.get(client.base_url.join(f"{prefix}/adapters{slash}"))
    assert refused.status_code == 401  # the guard sees what is routed
    assert client.get(f"{prefix}/adapters//").status_code in (404, 422)


def test_addresses_in_answers_have_the_prefix(client: httpx.Client) -> None:
    assert client.get("/").headers["location"] == "/llm/docs"
    document = client.get("/llm/openapi.json").json()
    assert document["servers"][0]["url"] == "/llm"
    page = client.get("/docs").text
    assert "'/llm/openapi.json'" in page
    for script in re.findall(r'(?:src|href)="(/[^"]+)"', page):
        assert script.startswith("/llm/")
        answer = httpx.get(client.base_url.join(script))  # without a key, as a browser asks
        assert answer.status_code == 200, script


def test_head_is_get_without_its_body_on_every_route(client: httpx.Client) -> None:
    asked = client
    document = asked.get("/openapi.json").json()
    paths = [path for path, operations in document["paths"].items() if "get" in operations]
    for path in ["/", "/docs", "/openapi.json", *paths]:
        path = re.sub(r"{name}", "plain", re.sub(r"{number}", "1", path))  # noqa: PLW2901
        path += "?a=plain&b=full" if path == "/diff" else ""  # noqa: PLW2901
        get, head = asked.get(path), asked.head(path)
        assert head.status_code == get.status_code, path
        assert head.content == b""
        assert set(head.headers) == set(get.headers), path
        if path not in ("/metrics", "/debug/engine", "/info"):  # these change meanwhile
            assert head.headers.get("content-length") == get.headers.get("content-length"), path
    assert asked.put("/health").headers["allow"] == "GET, HEAD"


def test_a_location_has_the_prefix(client: httpx.Client, tiny_backbone: Path) -> None:
    content = (tiny_backbone / "adapters" / "plain.safetensors").read_bytes()
    answer = client.put("/adapters/moved", content=content, headers=OCTETS)
    assert answer.status_code == 201
    assert answer.headers["location"] == "/llm/adapters/moved"
    assert client.get(answer.headers["location"]).json()["name"] == "moved"


def scope_behind(trusted: list[str], client: tuple[str, int] | None, **headers: str) -> dict:
    """The scope after the middleware: what no answer shows."""
    seen = {}

    async def app(scope: dict, receive: object, send: object) -> None:
        seen.update(scope)

    named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "client": client, "scheme": "http", "headers": named}
    coroutine = Proxies(app, trusted)(scope, None, None)
    with pytest.raises(StopIteration):
        coroutine.send(None)
    return seen


FORWARDED = {"x_forwarded_for": "203.0.113.7", "x_forwarded_proto": "https"}


@pytest.mark.parametrize(
    ("trusted", "client", "believed"),
    [
        ([], ("127.0.0.1", 1), False),
        (["10.0.0.0/8"], ("127.0.0.1", 1), False),
        (["10.0.0.0/8"], ("10.1.2.3", 1), True),
        (["10.0.0.0/8"], ("::ffff:10.1.2.3", 1), True),
        (["fd00::/8"], ("fd00::1", 1), True),
        (["[::1]"], ("::1", 1), True),
        (["10.0.0.0/8"], None, False),
        (["unix"], None, True),
        (["unix"], ("127.0.0.1", 1), False),
    ],
)
def test_forwarded_headers_are_believed_from_trusted_proxies_alone(
    trusted: list[str], client: tuple[str, int] | None, believed: bool
) -> None:
    scope = scope_behind(trusted, client, host="a", x_forwarded_host="b.example:444", **FORWARDED)
    assert scope["scheme"] == ("https" if believed else "http")
    assert scope["client"] == (("203.0.113.7", 0) if believed else client)
    assert (b"host", b"b.example:444" if believed else b"a") in scope["headers"]


@pytest.mark.parametrize(
    ("hops", "expected"),
    [
        ("1.1.1.1:80", "1.1.1.1"),
        ("[2001:db8::1]:80", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("6.6.6.6, 1.1.1.1, 10.0.0.2", "1.1.1.1"),
        ("10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("unknown, 10.0.0.2", "10.0.0.2"),
        ("<script>", "10.0.0.1"),
        ("", "10.0.0.1"),
    ],
)
def test_the_client_is_the_last_hop_that_is_no_proxy(hops: str, expected: str) -> None:
    scope = scope_behind(["10.0.0.0/8"], ("10.0.0.1", 1), x_forwarded_for=hops)
    assert scope["client"][0] == expected


def test_a_page_of_a_listed_origin_may_ask_and_read(client: httpx.Client) -> None:
    preflight = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    answer = httpx.options(client.base_url.join("/encode"), headers=preflight)  # no key
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    for status, answer in (
        (200, client.post("/encode", json=BODY, headers={"origin": ORIGIN})),
        (404, client.get("/no/such/path", headers={"origin": ORIGIN})),
        (401, httpx.get(client.base_url.join("/info"), headers={"origin": ORIGIN})),
        (422, client.post("/encode", json={}, headers={"origin": ORIGIN})),
    ):
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "origin" in answer.headers["vary"].lower()
        exposed = answer.headers["access-control-expose-headers"]
        assert {"x-request-id", "etag", "retry-after"} <= set(exposed.split(", "))
        assert "access-control-allow-credentials" not in answer.headers


def test_a_page_of_another_origin_may_not(client: httpx.Client, tiny_server: Served) -> None:
    other = {"origin": "https://other.example"}
    for answer in (
        client.get("/info", headers=other),
        client.options("/encode", headers=other | {"access-control-request-method": "POST"}),
        httpx.get(f"{tiny_server.url}/info", headers={"origin": ORIGIN}),  # no setting
    ):
        assert "access-control-allow-origin" not in answer.headers


def test_a_star_is_every_origin_and_never_with_credentials() -> None:
    headers = dict(Cors(["*"]).headers([(b"origin", b"https://any.example")]))
    assert headers[b"access-control-allow-origin"] == b"*"
    assert b"access-control-allow-credentials" not in headers


# A unix socket.


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "t.sock"


@contextmanager
def served_on(
    sock: Path, backbone: Path, folder: Path, *more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`trunkline serve --uds`, ready."""
    command = [sys.executable, "-m", "server.cli", "serve", str(backbone), "--uds", str(sock)]
    environment = os.environ | {"TRUNKLINE_DATA_DIR": str(folder / "data")}
    with (folder / "uds.log").open("wb") as out:
        process = subprocess.Popen([*command, *more], stdout=out, stderr=out, env=environment)
    try:
        wait_until(lambda: process.poll() is not None or is_ready(sock))
        assert process.poll() is None, (folder / "uds.log").read_text()
        yield process
    finally:
        process.terminate()
        process.wait(20)


def through(sock: Path) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(sock))
    return httpx.Client(transport=transport, base_url="http://localhost", timeout=60)


def is_ready(sock: Path) -> bool:
    if not sock.exists():
        return False
    with closing(socket.socket(socket.AF_UNIX)) as probe:
        if probe.connect_ex(str(sock)):  # left by a server that was killed
            return False
    with through(sock) as client:
        return client.get("/ready").status_code == 200


def test_a_unix_socket_is_served_and_removed_at_the_end(
    sock: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as killed:  # what a server that was killed leaves
        killed.bind(str(sock))
    backbone = trunk(tmp_path / "trunk", "xyz", 64)  # none of its letters is in the usual text
    with served_on(sock, backbone, tmp_path, "--dtype", "float32"):
        assert stat.S_IMODE(sock.stat().st_mode) == 0o660
        with through(sock) as client:
            assert client.post("/encode", json={"inputs": "xyz"}).status_code == 200
            assert client.get("/health").status_code == 200
        told = (tmp_path / "uds.log").read_text()
        assert f"at unix://{sock}\n" in told
        assert tried(told)["usage"]["total_tokens"] > 0
        again = ["serve", str(tiny_backbone), "--uds", str(sock), "--data", str(tmp_path / "2")]
        refused = CliRunner().invoke(main, again)
        assert refused.exit_code == 1
        assert f"another server listens on {sock}" in refused.output
    assert not sock.exists()


def test_a_path_that_is_no_socket_is_kept(sock: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    sock.write_text("of the user")
    arguments = ["serve", str(tiny_backbone), "--uds", str(sock), "--data", str(tmp_path / "d")]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "is there and no socket" in refused.output
    assert sock.read_text() == "of the user"


# The request that the start prints.


def tried(told: str) -> dict:
    """The answer to the printed command, run by a shell as it stands."""
    if which("curl") is None:
        pytest.skip("there is no curl")
    command = told.partition("try: ")[2]
    command = command[: command.index("\n", command.index("\\\n") + 3)]
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    answer: dict = json.loads(done.stdout)
    assert "error" not in answer, (command, answer)
    return answer


def trunk(folder: Path, characters: str, block_size: int) -> Path:
    """A trunk without a critic whose vocabulary is these characters."""
    config = dataclasses.replace(
        TINY,
        vocab_size=len(characters),
        block_size=block_size,
        add_critic_head=False,
        mask_token_id=None,
        pad_token_id=None,
        cls_token_id=None,
    )
    tokenizer = Tokenizer.of_characters({c: i for i, c in enumerate(characters)})
    tensors = backbone_tensors(config, random_gpt(config).state_dict())
    write_backbone(folder, config, tensors, tokenizer)
    return folder


def test_the_printed_request_works_for_a_trunk_of_four_tokens(serve: Serve, tmp_path: Path) -> None:
    served = serve(trunk(tmp_path / "it's a trunk", "To be'", 4), "--dtype", "float32")
    assert 0 < tried(served.log.read_text())["usage"]["total_tokens"] <= 4


def test_the_printed_request_works_with_a_critic_and_adapters(tiny_server: Served) -> None:
    assert "score" in tried(tiny_server.log.read_text())["data"][0]


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_is_printed_in_brackets(host: str) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    settings = load_settings({"host": host, "port": 0})
    try:
        listener = listen(settings)
    except BadSettings:
        pytest.skip("this machine has no address ::1")
    with listener:
        url = url_of(settings, listener)
    assert re.fullmatch(r"http://\[::1\]:\d+", url)
    assert _curl_address(url, "/critic") == f"'{url}/critic'"


def test_a_removed_prefix_is_no_path_of_the_server_s_own(tmp_path: Path) -> None:
    environment = {"TRUNKLINE_DATA_DIR": str(tmp_path)}
    for taken in ("/adapters", "/as/x", "/v1", "/docs"):
        done = CliRunner().invoke(main, ["serve", "--root-path", taken], env=environment)
        assert done.exit_code == 1
        assert f"paths of its own below /{taken.split('/')[1]}" in done.output
