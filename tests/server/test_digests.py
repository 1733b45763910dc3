"""RFC 9530's digests of a body: what is verified, what is ignored, what is malformed."""

import base64
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from adapter_client import OCTETS, Adapters, adapters_of, assert_refused
from conftest import Served
from hypothesis import given
from hypothesis import strategies as st

from server.digests import parse_digests
from server.errors import RequestError

_names = (f"digests-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def adapters(tiny_server: Served) -> Iterator[Adapters]:
    with adapters_of(tiny_server, Path(f"{tiny_server.log}.data")) as adapters:
        yield adapters


def b64(algorithm: str, content: bytes) -> str:
    return base64.b64encode(hashlib.new(algorithm, content).digest()).decode()


@pytest.fixture(scope="module")
def file(adapters: Adapters) -> bytes:
    return adapters.file(50)


@pytest.fixture(scope="module")
def right(file: bytes) -> dict[str, str]:
    return {name: b64(name.replace("-", ""), file) for name in ("sha-256", "sha-512")}


def put(adapters: Adapters, file: bytes, headers: Sequence[tuple[str, str]], name: str = "plain"):
    lines = [*OCTETS.items(), *headers]
    return adapters.client.put(f"/adapters/{name}", content=file, headers=lines)


def test_right_digests_are_taken_in_every_form(
    adapters: Adapters, file: bytes, right: dict[str, str]
) -> None:
    short, long = right["sha-256"], right["sha-512"]
    forms = [
        f"sha-256=:{short}:",
        f"sha-512=:{long}:",
        f"sha-256=:{short}:, sha-512=:{long}:",
        f"sha-256=:{short}:;p=1;q, sha-512=:{long}:; r=tok",
        f"sha-256=:{short.rstrip('=')}:",
        f'md5=:AAAA:, unixsum=123, a="x, y", b=(1 2), c, sha-256=:{short}:',
        "md5=:AAAA:",
        "",
    ]
    for header, form in itertools.product(("content-digest", "repr-digest"), forms):
        answer = put(adapters, file, [(header, form)], next(_names))
        assert answer.status_code == 201, (form, answer.text)


def test_wrong_digests_are_refused_with_their_algorithm(
    adapters: Adapters, file: bytes, right: dict[str, str]
) -> None:
    wrong = {name: b64(name.replace("-", ""), b"other") for name in right}
    cases = [
        ("sha-512", [("content-digest", f"sha-512=:{wrong['sha-512']}:")]),
        ("sha-512", [("repr-digest", f"sha-512=:{wrong['sha-512']}:")]),
        ("sha-256", [("content-digest", f"sha-256=:{wrong['sha-256']}:;p=1")]),
        (
            "sha-512",
            [
                ("content-digest", f"sha-256=:{right['sha-256']}:"),
                ("content-digest", f"sha-512=:{wrong['sha-512']}:"),
            ],
        ),
        ("sha-512", [("content-digest", f"sha-512=:{right['sha-256']}:")]),
        ("sha-256", [("content-digest", "sha-256=::")]),
        ("sha-256", [("x-content-sha256", "f" * 64)]),
    ]
    with adapters.unchanged():
        for algorithm, headers in cases:
            answer = put(adapters, file, headers)
            assert_refused(answer, 422, "invalid_adapter", "digest_mismatch")
            assert answer.json()["error"]["details"]["algorithm"] == algorithm


MALFORMED = [
    "sha-256",
    "sha-256=",
    "sha-256=abc",
    'sha-256="abc"',
    "sha-256=:not base64:",
    "sha-256=:AAAA",
    "sha-256=1",
    "SHA-256=:AAAA:",
    "md5=:AAAA:,",
    ",md5=:AAAA:",
    "md5=:AAAA: x",
    "md5 =:AAAA:",
    'a="x',
    "sha-256=:A:",
]


def test_what_is_no_dictionary_is_malformed(adapters: Adapters, file: bytes) -> None:
    with adapters.unchanged():
        for text in MALFORMED:
            for header in ("content-digest", "repr-digest"):
                refused = put(adapters, file, [(header, text)])
                assert_refused(refused, 400, "malformed_request")


@given(st.text('sha-2561:=;,"() *?@.\\A\xe9', max_size=30))
def test_any_text_is_read_or_malformed(text: str) -> None:
    refused = None
    try:
        found = parse_digests("Content-Digest", [text])
    except RequestError as error:
        refused = error.code
    else:
        assert all(name in ("sha-256", "sha-512") for name, _ in found)
    assert refused in (None, "malformed_request")


def test_the_stored_file_comes_with_its_digests(adapters: Adapters, file: bytes) -> None:
    name = f"acme/{next(_names)}"
    digest = put(adapters, file, [], name).json()["digest"]
    answer = adapters.client.get(f"/adapters/{name}/file")
    assert answer.content == file
    sha256 = base64.b64encode(bytes.fromhex(digest.removeprefix("sha256:"))).decode()
    assert answer.headers["content-digest"] == f"sha-256=:{sha256}:"
    assert answer.headers["repr-digest"] == answer.headers["content-digest"]
    assert answer.headers["content-length"] == str(len(file))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert (
        f'filename="{name.replace("/", "-")}-1.safetensors"'
        in (answer.headers["content-disposition"])
    )
    back = dict(answer.headers.items())["content-digest"]
    again = put(adapters, answer.content, [("content-digest", back)], name)
    assert again.status_code == 200


# Of each a header repeats as many as fit: what can be cut into items in many ways takes for ever.
_PIECES = ("a", "1", "a ", " ", "a:", '"', '""', "?1", "@1", "1.1", '\\"', ";a", ":a:", ", a", "()")


@pytest.mark.parametrize("before", ["x=(", 'x="', "x=:", "x;", ""])
@pytest.mark.parametrize("piece", _PIECES)
def test_a_header_of_64_kib_is_read_in_a_moment(before: str, piece: str) -> None:
    began = time.process_time()
    with suppress(RequestError):
        parse_digests("Content-Digest", [(before + piece * (1 << 16))[: 1 << 16]])
    assert time.process_time() - began < 1


def test_items_of_an_inner_list_have_a_space_between_them() -> None:
    for value in ("()", "( )", "(a)", "(a b)", '(  a   "b"  1)', "(:AA==: ?1)"):
        assert parse_digests("Content-Digest", [f"x={value}, sha-256=:AAAA:"])
    for value in ("(", "(a", '(a"b")', "(1?1)", "(a b"):
        with pytest.raises(RequestError):
            parse_digests("Content-Digest", [f"x={value}, sha-256=:AAAA:"])
