"""What a wrong body gets: the right status and code, in 4 KiB, without its own words; and the next
good request is answered as before."""

import json
import socket
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from conftest import Serve, Served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MARK = "zebra"  # in the bodies' values, never in an answer
JSON = {"content-type": "application/json"}
MAX_ERROR_BYTES = 4096
GOOD = {"adapter": "full", "inputs": ["To be, or not to be", [1, 2, 3]]}
INFERENCE = ["/encode", "/critic", "/classify"]


@dataclass(frozen=True)
class Bad:
    body: bytes
    status: int
    code: str
    headers: dict[str, str] = field(default_factory=lambda: JSON)


def of(value: object, status: int, code: str) -> Bad:
    return Bad(json.dumps(value).encode(), status, code)


def inputs(value: object, status: int, code: str) -> Bad:
    return of({"inputs": value}, status, code)


def raw(text: str | bytes, status: int, code: str) -> Bad:
    return Bad(text.encode() if isinstance(text, str) else text, status, code)


def sent_as(headers: dict[str, str]) -> Bad:
    return Bad(b'{"inputs": "abc"}', 415, "unsupported_media_type", headers)


def coded(encoding: str) -> Bad:
    return sent_as(JSON | {"content-encoding": encoding})


BAD = {
    "empty": raw("", 400, "malformed_json"),
    "white space": raw("  \n", 400, "malformed_json"),
    "cut off": raw('{"inputs": "zebr', 400, "malformed_json"),
    "cut off in a list": raw('{"inputs": ["zebra",', 400, "malformed_json"),
    "trailing garbage": raw('{"inputs": "zebra"}zebra', 400, "malformed_json"),
    "two values": raw('{"inputs": "a"} {"inputs": "zebra"}', 400, "malformed_json"),
    "trailing comma": raw('{"inputs": "zebra",}', 400, "malformed_json"),
    "single quotes": raw("{'inputs': 'zebra'}", 400, "malformed_json"),
    "a control character": raw('{"inputs": "zebra\x01"}', 400, "malformed_json"),
    "a number with a leading zero": raw('{"inputs": [01]}', 400, "malformed_json"),
    "BOM": raw(b'\xef\xbb\xbf{"inputs": "a"}', 400, "malformed_json"),
    "UTF-16 with BOM": raw('{"inputs": "a"}'.encode("utf-16"), 400, "invalid_utf8"),
    "UTF-16 without BOM": raw('{"inputs": "a"}'.encode("utf-16-le"), 400, "malformed_json"),
    "invalid UTF-8": raw(b'{"inputs": "zebra\xff"}', 400, "invalid_utf8"),
    "overlong UTF-8": raw(b'{"inputs": "zebra\xc0\xaf"}', 400, "invalid_utf8"),
    "a surrogate in UTF-8": raw(b'{"inputs": "zebra\xed\xa0\x80"}', 400, "invalid_utf8"),
    "lone high surrogate": raw(r'{"inputs": "zebra\ud800"}', 422, "validation_error"),
    "lone low surrogate": raw(r'{"inputs": "zebra\udc00 "}', 422, "validation_error"),
    "lone surrogate in a key": raw(r'{"\ud800": 1, "inputs": "a"}', 422, "validation_error"),
    "null": raw("null", 422, "validation_error"),
    "a list": raw("[]", 422, "validation_error"),
    "a list of bodies": of([{"inputs": MARK}], 422, "validation_error"),
    "a text": of(MARK, 422, "validation_error"),
    "a number": raw("5", 422, "validation_error"),
    "true": raw("true", 422, "validation_error"),
    "nothing in it": of({}, 422, "validation_error"),
    "duplicate key": raw('{"inputs": "a", "inputs": "zebra"}', 400, "duplicate_key"),
    "duplicate key, escaped": raw(r'{"inputs": "a", "\u0069nputs": "a"}', 400, "duplicate_key"),
    "duplicate key deep down": raw('{"inputs": [{"zebra":1,"zebra":2}]}', 400, "duplicate_key"),
    "unknown key": of({"inputs": "a", f"{MARK} {MARK}": 1}, 422, "validation_error"),
    "unknown key, long": of({"inputs": "a", MARK * 9: 1}, 422, "validation_error"),
    "a key of another case": of({"Inputs": "a"}, 422, "validation_error"),
    "NaN": raw('{"inputs": [NaN]}', 400, "non_finite_number"),
    "NaN as an option": raw('{"inputs": "a", "timeout_ms": NaN}', 400, "non_finite_number"),
    "Infinity": raw('{"inputs": [1, Infinity]}', 400, "non_finite_number"),
    "-Infinity": raw('{"inputs": [[-Infinity]]}', 400, "non_finite_number"),
    "1e400": raw('{"inputs": [1e400]}', 400, "non_finite_number"),
    "-1e400 as an option": raw('{"inputs": "a", "timeout_ms": -1e400}', 400, "non_finite_number"),
    "1e400 under an unknown key": raw('{"inputs": "a", "x": 1e400}', 400, "non_finite_number"),
    "depth 100,000": raw('{"inputs":' + "[" * 100_000 + "]" * 100_000 + "}", 400, "malformed_json"),
    "depth 100,000, never closed": raw("[" * 100_000, 400, "malformed_json"),
    "depth 300": raw('{"inputs":' + "[" * 300 + "]" * 300 + "}", 400, "malformed_json"),
    "objects nested 100,000": raw('{"inputs":' * 100_000, 400, "malformed_json"),
    "no inputs": inputs([], 422, "empty_input"),
    "an empty row": inputs([[]], 422, "empty_input"),
    "an empty row among others": inputs([[1], []], 422, "empty_input"),
    "an empty text": inputs("", 422, "empty_input"),
    "an empty text among others": inputs([MARK, ""], 422, "empty_input"),
    "too long a text": inputs(MARK * 13, 422, "sequence_too_long"),
    "too long a row": inputs([[1, 2], [1] * 65], 422, "sequence_too_long"),
    "a text of 1,000,000": inputs("a" * 1_000_000, 422, "sequence_too_long"),
    "id -1": inputs([-1], 422, "token_out_of_range"),
    "id of vocab_size": inputs([[1, 65]], 422, "token_out_of_range"),
    "id 10^19": inputs([10**19], 422, "token_out_of_range"),
    "id -10^19": inputs([[-(10**19)]], 422, "token_out_of_range"),
    "id 2^63": inputs([2**63], 422, "token_out_of_range"),
    "id of 5,000 digits": raw('{"inputs": [' + "9" * 5000 + "]}", 422, "validation_error"),
    "id 1.5": inputs([1.5], 422, "validation_error"),
    "id 1.0": inputs([[1, 1.0]], 422, "validation_error"),
    "id true": inputs([1, True], 422, "validation_error"),
    "id true first": inputs([True], 422, "validation_error"),
    "id as a text": inputs([1, "1"], 422, "validation_error"),
    "id null": inputs([[None]], 422, "validation_error"),
    "ids nested deeper": inputs([[[1]]], 422, "validation_error"),
    "inputs null": inputs(None, 422, "validation_error"),
    "inputs true": inputs(True, 422, "validation_error"),
    "inputs a number": inputs(5, 422, "validation_error"),
    "inputs an object": inputs({MARK: MARK}, 422, "validation_error"),
    "a row an object": inputs([{MARK: 1}], 422, "validation_error"),
    "a row null": inputs(["a", None], 422, "validation_error"),
    "200,000 wrong items": inputs([MARK] + [1.5] * 200_000, 422, "validation_error"),
    "200,000 wrong ids": inputs([1] + [MARK] * 200_000, 422, "validation_error"),
    "a character unknown": inputs("zebra𝕏", 422, "untokenizable_text"),
    "NUL in a text": inputs("zebra\0", 422, "untokenizable_text"),
    "a million items": inputs(["a"] * 1_000_000, 413, "too_many_inputs"),
    "a million rows": inputs([[1]] * 1_000_000, 413, "too_many_inputs"),
    "fan-out beyond the cap": of(
        {"inputs": ["a"] * 1025, "adapters": ["full", "base"]}, 413, "too_many_inputs"
    ),
    "truncate as a text": of({"inputs": "a", "truncate": "true"}, 422, "validation_error"),
    "truncate 1": of({"inputs": "a", "truncate": 1}, 422, "validation_error"),
    "timeout 0": of({"inputs": "a", "timeout_ms": 0}, 422, "validation_error"),
    "timeout -1": of({"inputs": "a", "timeout_ms": -1}, 422, "validation_error"),
    "timeout 1.5": of({"inputs": "a", "timeout_ms": 1.5}, 422, "validation_error"),
    "timeout 10^30": of({"inputs": "a", "timeout_ms": 10**30}, 422, "validation_error"),
    "adapter a number": of({"inputs": "a", "adapter": 5}, 422, "validation_error"),
    "adapter a list": of({"inputs": "a", "adapter": [MARK]}, 422, "validation_error"),
    "adapters a text": of({"inputs": "a", "adapters": MARK}, 422, "validation_error"),
    "no adapters": of({"inputs": "a", "adapters": []}, 422, "validation_error"),
    "adapters of numbers": of({"inputs": "a", "adapters": [1] * 200_000}, 422, "validation_error"),
    "257 adapters": of({"inputs": "a", "adapters": ["base"] * 257}, 422, "validation_error"),
    "both adapter and adapters": of(
        {"inputs": "a", "adapter": "full", "adapters": ["full"]}, 422, "validation_error"
    ),
    "adapter of 1,000,000": of({"inputs": "a", "adapter": "a" * 10**6}, 422, "validation_error"),
    "adapter unknown": of({"inputs": "a", "adapter": "nobody"}, 404, "adapter_not_found"),
    "version unknown": of({"inputs": "a", "adapter": "full@9"}, 404, "version_not_found"),
    "over the body cap": raw(b" " * ((8 << 20) + 1), 413, "body_too_large"),
    "no content-type": sent_as({}),
    "content-type text": sent_as({"content-type": "text/plain"}),
    "content-type of a form": sent_as({"content-type": "application/x-www-form-urlencoded"}),
    "content-type nearly JSON": sent_as({"content-type": "application/jsonp"}),
    "gzip": coded("gzip"),
    "deflate": coded("deflate"),
    "br": coded("br"),
    "two encodings": coded("identity, gzip"),
    "an encoding that is none": coded(MARK),
}

OPTIONS = {  # of /encode alone
    "output unknown": {"outputs": [MARK]},
    "no outputs": {"outputs": []},
    "outputs a text": {"outputs": "embedding"},
    "200,000 outputs": {"outputs": [MARK] * 200_000},
    "pooling unknown": {"pooling": MARK},
    "pooling a list": {"pooling": ["mean"]},
    "normalize 1": {"normalize": 1},
    "dimensions 0": {"dimensions": 0},
    "dimensions -1": {"dimensions": -1},
    "dimensions 17 of 16": {"dimensions": 17},
    "dimensions 10^30": {"dimensions": 10**30},
    "dimensions true": {"dimensions": True},
    "layer 0": {"layer": 0},
    "layer -1": {"layer": -1},
    "layer 3 of 2": {"layer": 3},
    "layer 10^30": {"layer": 10**30},
    "layer 1.0": {"layer": 1.0},
    "top_k 0": {"top_k": 0},
    "top_k 1,001": {"top_k": 1001},
    "top_k as a text": {"top_k": "5"},
    "format unknown": {"encoding_format": MARK},
    "format of another case": {"encoding_format": "BASE64"},
}


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client


def good_answer(client: httpx.Client) -> list[dict]:
    answer = client.post("/encode", json=GOOD)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


@pytest.fixture
def before(client: httpx.Client) -> Iterator[None]:
    """The good request is answered the same before and after."""
    expected = good_answer(client)
    yield
    assert good_answer(client) == expected
    assert client.get("/health").status_code == 200


def check_refusal(answer: httpx.Response, status: int, code: str) -> dict:
    assert answer.status_code == status, answer.text[:500]
    assert len(answer.content) <= MAX_ERROR_BYTES
    assert MARK not in answer.text
    assert MARK not in str(answer.headers)
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "details", "request_id"}
    assert error["code"] == code
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["message"].strip()
    return error


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("name", BAD)
def test_a_wrong_body_is_refused_with_its_code_and_changes_nothing(
    client: httpx.Client, name: str
) -> None:
    bad = BAD[name]
    for path in INFERENCE:
        answer = client.post(path, content=bad.body, headers=bad.headers)
        check_refusal(answer, bad.status, bad.code)


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_option_is_refused(client: httpx.Client, name: str) -> None:
    answer = client.post("/encode", json={"inputs": "a"} | OPTIONS[name])
    check_refusal(answer, 422, "validation_error")


@pytest.mark.parametrize(
    "content_type",
    ["application/json; charset=utf-8", "APPLICATION/JSON", "application/json ;x=y"],
)
def test_a_content_type_with_parameters_or_in_capitals_is_json(
    client: httpx.Client, content_type: str
) -> None:
    headers = {"content-type": content_type, "content-encoding": "identity"}
    assert client.post("/encode", content=b'{"inputs":"a"}', headers=headers).status_code == 200


def test_an_untokenizable_character_is_told_by_row_and_offset(client: httpx.Client) -> None:
    answer = client.post("/encode", json={"inputs": ["ok", "a😀", "aé"]})
    error = check_refusal(answer, 422, "untokenizable_text")
    assert error["details"] == {"row": 1, "offset": 1, "field": "inputs[1]"}


@pytest.mark.parametrize(
    ("value", "row"), [([["a"], []], 0), ([[1], []], 1), (["a", "b", ""], 2), ([[1], [True]], 1)]
)
def test_the_row_at_fault_is_told(client: httpx.Client, value: object, row: int) -> None:
    error = client.post("/encode", json={"inputs": value}).json()["error"]
    assert error["details"] == {"row": row, "field": f"inputs[{row}]"}


def test_a_body_without_a_length_is_capped_while_it_arrives(client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(12):
            yield b" " * (1 << 20)

    try:
        answer = client.post("/encode", content=endless(), headers=JSON)
    except httpx.TransportError:  # the answer came, and the connection went, before all was sent
        answer = None
    if answer is not None:
        check_refusal(answer, 413, "body_too_large")
    good_answer(client)


def test_a_request_whose_deadline_is_over_gets_504_and_no_forward(client: httpx.Client) -> None:
    """To read 128,000 ids alone takes over a millisecond."""

    def tokens_run() -> str:
        lines = client.get("/metrics").text.splitlines()
        return next(line for line in lines if line.startswith("trunkline_tokens_total"))

    before = tokens_run()
    answer = client.post("/encode", json={"inputs": [[1] * 64] * 2000, "timeout_ms": 1})
    check_refusal(answer, 504, "deadline_exceeded")
    assert tokens_run() == before


# Other routes with bodies.


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/tokenize", {"inputs": [1, 2]}, 422, "validation_error"),
        ("/tokenize", {"inputs": "zebra𝕏"}, 422, "untokenizable_text"),
        ("/tokenize", {"inputs": [""]}, 422, "empty_input"),
        ("/tokenize", {"text": MARK}, 422, "validation_error"),
        ("/detokenize", {"ids": MARK}, 422, "validation_error"),
        ("/detokenize", {"ids": []}, 422, "empty_input"),
        ("/detokenize", {"ids": [65]}, 422, "token_out_of_range"),
        ("/detokenize", {"ids": [[-1]]}, 422, "token_out_of_range"),
        ("/detokenize", {"ids": [2**70]}, 422, "token_out_of_range"),
        ("/detokenize", {"ids": [1.0]}, 422, "validation_error"),
    ],
)
def test_the_tokenizer_s_routes_are_as_strict(
    client: httpx.Client, path: str, body: dict[str, object], status: int, code: str
) -> None:
    check_refusal(client.post(path, json=body), status, code)


def test_tokenize_and_detokenize_are_inverse(client: httpx.Client) -> None:
    texts = ["[CLS]To be!", "a"]
    data = client.post("/tokenize", json={"inputs": texts}).json()["data"]
    ids = [[token["id"] for token in row["tokens"]] for row in data]
    assert client.post("/detokenize", json={"ids": ids}).json()["texts"] == texts


# Whatever JSON there is: never a 500, and never more than 4 KiB of refusal.

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(string.printable)
    | st.sampled_from(["full", "base", "mean", "embedding", "base64", "a", MARK]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    *("adapter", "adapters", "inputs", "outputs", "pooling", "normalize", "dimensions", "layer"),
    *("top_k", "truncate", "encoding_format", "timeout_ms", "model", "input", "ids", "user"),
]
bodies = st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5) | json_values
right = st.fixed_dictionaries(
    {"inputs": st.sampled_from(["a", ["a", "b"], [1, 2]])},
    optional={
        "adapter": st.sampled_from(["full", "plain", None]),
        "outputs": st.lists(st.sampled_from(["embedding", "tokens", "critic", "logits"])),
        "layer": st.integers(-1, 4),
        "dimensions": st.integers(-1, 20),
        "top_k": st.integers(-1, 80),
        "pooling": st.sampled_from(["mean", "cls", "last", None]),
        "encoding_format": st.sampled_from(["float", "base64", None]),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=bodies | right,
    path=st.sampled_from([*INFERENCE, "/tokenize", "/detokenize", "/v1/embeddings"]),
)
def test_no_json_gets_a_500(client: httpx.Client, body: object, path: str) -> None:
    answer = client.post(path, content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert len(answer.content) <= MAX_ERROR_BYTES
    else:
        assert "NaN" not in answer.text


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=80), path=st.sampled_from(INFERENCE))
def test_no_bytes_get_a_500(client: httpx.Client, content: bytes, path: str) -> None:
    answer = client.post(path, content=content, headers=JSON)
    assert answer.status_code in (400, 422), answer.text


# On the socket itself.


@pytest.fixture(scope="module")
def impatient(tiny_backbone: Path, serve_for_session: Serve) -> Served:
    """A server with small limits."""
    limits = ("--receive-timeout-s", "0.5", "--max-body-bytes", "2000", "--max-inputs", "4")
    return serve_for_session(tiny_backbone, "--dtype", "float32", *limits)


def talk(served: Served, *parts: bytes, host: bool = True) -> bytes:
    """Sends the parts, says nothing more, and returns all that comes until the server closes."""
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


HEAD = b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def parsed(received: bytes) -> tuple[int, bytes]:
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    "start", [b"content-length: 100\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"]
)
@pytest.mark.parametrize("more", [b"", b'{"inputs'])
def test_a_body_that_does_not_come_is_408_and_closed(
    impatient: Served, start: bytes, more: bytes
) -> None:
    if more and b"chunked" in start:
        more = f"{len(more):x}\r\n".encode() + more + b"\r\n"
    status, body = parsed(talk(impatient, HEAD + start, more))
    assert status == 408
    assert json.loads(body)["error"]["code"] == "receive_timeout"
    with impatient.client() as client:
        good_answer(client)


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\n{}  ",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: many\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\n{} and more\r\n0\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
    ids=[
        "both lengths",
        "two lengths",
        "length -1",
        "length a word",
        "chunk size no number",
        "chunk longer than said",
        "no HTTP",
    ],
)
def test_a_framing_that_can_be_read_in_two_ways_is_400_and_closed(
    impatient: Served, request_: bytes
) -> None:
    status, body = parsed(talk(impatient, request_))
    assert status == 400
    assert len(body) <= MAX_ERROR_BYTES
    with impatient.client() as client:
        good_answer(client)


def test_an_announced_length_over_the_cap_is_refused_before_the_body(impatient: Served) -> None:
    address = impatient.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=30) as connection:
        connection.sendall(HEAD + b"content-length: 2001\r\n\r\n")
        answer = connection.recv(65536)
    assert b" 413 " in answer.splitlines()[0]


def test_the_caps_are_the_settings(impatient: Served) -> None:
    with impatient.client() as client:
        assert client.post("/encode", json={"inputs": ["a"] * 4}).status_code == 200
        answer = client.post("/encode", json={"inputs": ["a"] * 5})
        details = check_refusal(answer, 413, "too_many_inputs")["details"]
        assert details == {"limit": 4, "setting": "max_inputs", "field": "inputs"}
        answer = client.post("/encode", json={"inputs": "a" * 2000})
        assert check_refusal(answer, 413, "body_too_large")["details"] == {"limit": 2000}


def test_no_traceback_in_any_of_it(tiny_server: Served, client: httpx.Client) -> None:
    for bad in list(BAD.values())[:20]:
        client.post("/encode", content=bad.body, headers=bad.headers)
    assert "Traceback" not in tiny_server.log.read_text()
