"""RFC 9110's conditions: what the headers mean, and that check and change are one."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from adapter_client import Adapters, adapters_of, assert_refused
from conftest import Served
from hypothesis import given
from hypothesis import strategies as st

from adapters.conditions import Condition
from adapters.errors import Conflict
from server.conditions import parse_tags
from server.errors import RequestError

_names = (f"conditions-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def adapters(tiny_server: Served) -> Iterator[Adapters]:
    with adapters_of(tiny_server, Path(f"{tiny_server.log}.data")) as adapters:
        yield adapters


@pytest.fixture
def name(adapters: Adapters) -> Iterator[str]:
    """A new name at version 2; version 1 is there too."""
    name = next(_names)
    for seed in (1, 2):
        assert adapters.put(name, adapters.file(seed)).status_code == 201
    yield name
    adapters.client.delete(f"/adapters/{name}")


# The parser.

TAG_TEXT = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters='"\x7f')
    .filter(lambda c: not "\x7f" <= c < "\x80"),
    max_size=8,
)  # fmt: skip
SPACE = st.text(" \t", max_size=2)


@given(
    st.lists(st.tuples(TAG_TEXT, st.booleans(), SPACE, SPACE), min_size=1, max_size=6), st.data()
)
def test_every_list_of_tags_is_read_whole_and_weak_ones_match_nothing(tags, data) -> None:
    parts = [f'{a}{"W/" * weak}"{text}"{b}' for text, weak, a, b in tags]
    cut = data.draw(st.integers(0, len(parts)))
    lines = [",".join(part) for part in (parts[:cut], parts[cut:]) if part]
    assert parse_tags("If-Match", lines) == {text for text, weak, _, _ in tags if not weak}


@given(st.lists(st.text('W/"*,3 \t\x80ÿ\x7f', max_size=12), min_size=1, max_size=3))
def test_any_text_is_a_condition_or_malformed(lines: list[str]) -> None:
    try:
        found = parse_tags("If-Match", lines)
    except RequestError as error:
        refused = error.code
    else:
        refused = None
        assert found == "*" or not any('"' in tag for tag in found or ())
    assert refused in (None, "malformed_request")


@pytest.mark.parametrize("unit", ['"', ",", " ", '"a",', 'W/"', "* ", '" ', "\t,"])
def test_a_condition_of_64_kib_is_read_in_linear_time(unit: str) -> None:
    """In CPU time: it takes some milliseconds, and would take minutes in quadratic time."""
    text, began = (unit * 65_536)[:65_536], time.process_time()
    with suppress(RequestError):
        parse_tags("If-Match", [text])
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("condition", "current", "exists", "holds"),
    [
        (Condition(), 3, True, True),
        (Condition("*"), None, True, True),
        (Condition("*"), None, False, False),
        (Condition({"3"}), 3, True, True),
        (Condition({"03"}), 3, True, False),
        (Condition(set()), 3, True, False),
        (Condition({"3"}), None, True, False),
        (Condition(None, "*"), None, False, True),
        (Condition(None, "*"), None, True, False),
        (Condition(None, {"2"}), 3, True, True),
        (Condition(None, {"3"}), 3, True, False),
        (Condition(None, set()), 3, True, True),
        (Condition({"3"}, {"3"}), 3, True, False),
    ],
)
def test_a_condition_is_held_against_the_state(
    condition: Condition, current: int | None, exists: bool, holds: bool
) -> None:
    if holds:
        condition.check("x", current, exists)
    else:
        with pytest.raises(Conflict):
            condition.check("x", current, exists)


def test_if_match_is_looked_at_before_if_none_match() -> None:
    with pytest.raises(Conflict, match="If-Match does not hold"):
        Condition({"1"}, {"3"}).check("x", 3, True)


# On the wire.

HOLDS = [
    {"if-match": '"2"'},
    {"if-match": "*"},
    {"if-match": '"7", "2" , W/"2"'},
    {"if-none-match": '"1"'},
    {"if-none-match": 'W/"2"'},
    {"if-match": '"2"', "if-none-match": '"1"'},
    {"if-unmodified-since": "Thu, 01 Jan 1970 00:00:00 GMT"},
    {"if-modified-since": "Fri, 01 Jan 2100 00:00:00 GMT"},
]
FAILS = [
    {"if-match": '"1"'},
    {"if-match": 'W/"2"'},
    {"if-match": '"1", "3"'},
    {"if-match": '"02"'},
    {"if-match": '""'},
    {"if-none-match": "*"},
    {"if-none-match": '"2"'},
    {"if-none-match": '"1", "2"'},
    {"if-match": '"2"', "if-none-match": "*"},
]
MALFORMED = [{"if-match": "2"}, {"if-none-match": '"2'}, {"if-match": '*, "2"'}, {"if-match": ""}]


def change(adapters: Adapters, name: str, verb: str, headers: dict[str, str]) -> httpx.Response:
    """Each kind of change whose tag is 2."""
    client = adapters.client
    if verb == "put":
        return adapters.put(name, adapters.file(3), headers)
    if verb == "delete":
        return client.delete(f"/adapters/{name}", headers=headers)
    if verb == "delete version":
        return client.delete(f"/adapters/{name}/versions/2", headers=headers)
    path = f"/adapters/{name}/aliases/current"
    return client.put(path, json={"version": 1}, headers=headers)


VERBS = ["put", "delete", "delete version", "point"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("headers", HOLDS, ids=str)
def test_a_condition_that_holds_lets_the_change_happen(
    adapters: Adapters, name: str, verb: str, headers: dict[str, str]
) -> None:
    assert change(adapters, name, verb, headers).status_code in (200, 201)


@pytest.mark.parametrize("verb", VERBS)
def test_a_condition_that_fails_or_is_malformed_changes_nothing(
    adapters: Adapters, name: str, verb: str
) -> None:
    with adapters.unchanged():
        for headers in FAILS:
            assert_refused(change(adapters, name, verb, headers), 412, "version_conflict")
        for headers in MALFORMED:
            assert_refused(change(adapters, name, verb, headers), 400, "malformed_request")


def test_a_condition_on_what_does_not_exist(adapters: Adapters, name: str) -> None:
    """404 comes before a condition where the change alone would be 404 (RFC 9110, 13.2.1)."""
    missing, client = next(_names), adapters.client
    with adapters.unchanged():
        for match in ("*", '"1"'):
            refused = adapters.put(missing, adapters.file(1), {"if-match": match})
            assert_refused(refused, 412, "version_conflict")
        absent = client.delete(f"/adapters/{missing}", headers={"if-match": "*"})
        assert_refused(absent, 404, "adapter_not_found")
        absent = client.delete(f"/adapters/{name}/versions/9", headers={"if-match": '"9"'})
        assert_refused(absent, 404, "version_not_found")
    made = adapters.put(missing, adapters.file(1), {"if-none-match": "*"})
    assert (made.status_code, made.headers["etag"]) == (201, '"1"')


def test_several_header_lines_are_one_list(adapters: Adapters, name: str) -> None:
    lines = [("if-match", '"9"'), ("if-match", '"2"')]
    assert adapters.client.delete(f"/adapters/{name}", headers=lines).status_code == 200


def test_the_same_bytes_under_a_condition(adapters: Adapters, name: str) -> None:
    """One that holds: 200, the same version. One that fails: 412, whatever the bytes are."""
    same = adapters.file(2)
    again = adapters.put(name, same, {"if-match": '"2"'})
    assert (again.status_code, again.headers["etag"]) == (200, '"2"')
    with adapters.unchanged():
        for headers in ({"if-match": '"1"'}, {"if-none-match": "*"}):
            assert_refused(adapters.put(name, same, headers), 412, "version_conflict")
    other = next(_names)
    made = adapters.put(other, same, {"if-none-match": "*"})
    assert (made.status_code, made.json()["digest"]) == (201, again.json()["digest"])


def test_an_alias_has_its_generation_as_its_tag(adapters: Adapters, name: str) -> None:
    path = f"/adapters/{name}/aliases/stable"

    def point(version: int, **headers: str) -> httpx.Response:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return adapters.client.put(path, json={"version": version}, headers=named)

    assert_refused(point(1, if_match="*"), 412, "version_conflict")
    assert point(1, if_none_match="*").headers["etag"] == '"1"'
    assert_refused(point(2, if_none_match="*"), 412, "version_conflict")
    assert point(2, if_match='"1"').headers["etag"] == '"2"'
    assert_refused(point(1, if_match='"1"'), 412, "version_conflict")


def test_a_read_answers_304_while_the_version_is_known(adapters: Adapters, name: str) -> None:
    for path, tag in (("", '"2"'), ("/versions/1", '"1"'), ("/file", '"2"'), ("@1/file", '"1"')):
        url = f"/adapters/{name}{path}"
        first = adapters.client.get(url)
        assert (first.status_code, first.headers["etag"]) == (200, tag)
        for known in (tag, "*", f'"9", {tag}'):
            again = adapters.client.get(url, headers={"if-none-match": known})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == tag
            assert again.headers.get("cache-control") == first.headers.get("cache-control")
        for unknown in ('"9"', f"W/{tag}"):
            again = adapters.client.get(url, headers={"if-none-match": unknown})
            assert (again.status_code, again.content) == (200, first.content)
        refused = adapters.client.get(url, headers={"if-match": '"9"', "if-none-match": tag})
        assert_refused(refused, 412, "version_conflict")
        malformed = adapters.client.get(url, headers={"if-none-match": "2"})
        assert_refused(malformed, 400, "malformed_request")
    absent = adapters.client.get("/adapters/absent", headers={"if-none-match": "*"})
    assert_refused(absent, 404, "adapter_not_found")


def test_of_many_conditional_changes_at_once_exactly_one_happens(
    adapters: Adapters, name: str
) -> None:
    """Deletes, moves and uploads that all name the same tag."""
    verbs = ["put", "point", "put", "point", "put", "point"]
    with ThreadPoolExecutor(len(verbs)) as threads:
        answers = list(
            threads.map(lambda verb: change(adapters, name, verb, {"if-match": '"2"'}), verbs)
        )
    assert [a.status_code for a in answers].count(412) >= len(verbs) - 2
    state = adapters.client.get(f"/adapters/{name}").json()
    done = [verb for verb, a in zip(verbs, answers, strict=True) if a.is_success]
    # one upload (its tag is the version) and one move (its tag is the generation) at most
    assert sorted(done) in (["point"], ["put"], ["point", "put"])
    assert state["aliases"]["current"]["generation"] == 2 + len(done)
