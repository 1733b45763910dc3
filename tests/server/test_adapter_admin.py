"""BAD_INPUTS, "Admin": versions, conditions, deletes under traffic, aliases, draining."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_client import QUESTION, Adapters, adapters_of, assert_refused, long_request, wait_until
from conftest import Serve


@pytest.fixture(scope="module")
def adapters(
    tiny_backbone: Path, serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapters]:
    """One row a batch, so that a request of many rows lasts."""
    data = tmp_path_factory.mktemp("admin")
    served = serve_for_session(
        *(tiny_backbone, "--data", data, "--dtype", "float32", "--max-batch-tokens", "64")
    )
    with adapters_of(served, data) as adapters:
        yield adapters


def numbers(adapters: Adapters, name: str) -> list[int]:
    return [version["version"] for version in adapters.versions(name)]


def answered_by(answer: httpx.Response) -> tuple[str, int]:
    """The one version that every row of an answer names."""
    assert answer.status_code == 200, answer.text
    (version,) = {
        (row["adapter"]["digest"], row["adapter"]["version"]) for row in answer.json()["data"]
    }
    return version


def ask(adapters: Adapters, reference: str) -> httpx.Response:
    return adapters.client.post("/encode", json={"adapter": reference, "inputs": "to be"})


def point(
    adapters: Adapters, name: str, alias: str, version: int, generation: int | None = None
) -> httpx.Response:
    headers = {} if generation is None else {"if-match": f'"{generation}"'}
    return adapters.client.put(
        f"/adapters/{name}/aliases/{alias}", json={"version": version}, headers=headers
    )


# Versions and conditions.


def test_the_same_bytes_again_are_the_same_version(adapters: Adapters) -> None:
    file = adapters.file(1)
    first, again = adapters.put("same", file), adapters.put("same", file)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert again.headers["etag"] == first.headers["etag"] == '"1"'
    assert numbers(adapters, "same") == [1]


def test_bytes_of_an_older_version_make_a_new_one(adapters: Adapters) -> None:
    old, new = adapters.file(2), adapters.file(3)
    answers = [adapters.put("again", file) for file in (old, new, old)]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert answers[2].json()["version"] == 3
    assert answers[2].json()["digest"] == answers[0].json()["digest"]
    assert adapters.client.delete("/adapters/again/versions/1").status_code == 200
    assert answered_by(ask(adapters, "again")) == (answers[0].json()["digest"], 3)


def test_a_stale_if_match_is_a_conflict_and_changes_nothing(adapters: Adapters) -> None:
    first = adapters.put("matched", adapters.file(4))
    second = adapters.put("matched", adapters.file(5), {"if-match": first.headers["etag"]})
    assert (second.status_code, second.headers["etag"]) == (201, '"2"')
    with adapters.unchanged():
        for name, match in (("matched", '"1"'), ("matched", '"3"'), ("nowhere", '"1"')):
            answer = adapters.put(name, adapters.file(6), {"if-match": match})
            assert_refused(answer, 412, "version_conflict")
        taken = adapters.put("matched", adapters.file(6), {"if-none-match": "*"})
        assert_refused(taken, 412, "version_conflict")
    fresh = adapters.put("matched-new", adapters.file(6), {"if-none-match": "*"})
    assert fresh.status_code == 201


@pytest.mark.parametrize(
    "headers",
    [
        *({"if-match": value} for value in ("x", "1", '"1" "2"', '*, "1"', 'w/"1"', '"1', "")),
        *({"if-none-match": value} for value in ("1", "", "**", '"1", *')),
    ],
)
def test_a_condition_that_is_none_is_refused(adapters: Adapters, headers: dict[str, str]) -> None:
    with adapters.unchanged():
        answer = adapters.put("plain", adapters.file(7), headers)
        assert_refused(answer, 400, "malformed_request")


def test_a_version_may_be_stored_without_being_served(adapters: Adapters) -> None:
    first = adapters.put("staged", adapters.file(8)).json()
    second = adapters.put("staged", adapters.file(9), activate="false").json()
    assert answered_by(ask(adapters, "staged")) == (first["digest"], 1)
    assert answered_by(ask(adapters, "staged@2")) == (second["digest"], 2)
    assert point(adapters, "staged", "current", 2).status_code == 200
    assert answered_by(ask(adapters, "staged")) == (second["digest"], 2)


def at_once(
    adapters: Adapters, name: str, files: list[bytes], headers: dict[str, str]
) -> list[httpx.Response]:
    """Uploads that have all begun, their conditions held, before any of them ends."""
    incoming = adapters.blobs / "incoming"

    def body(file: bytes) -> Iterator[bytes]:
        yield file[:-1]
        wait_until(lambda: len(list(incoming.iterdir())) == len(files))
        time.sleep(0.05)  # the others see it too before this one goes
        yield file[-1:]

    with ThreadPoolExecutor(len(files)) as threads:
        return list(threads.map(lambda file: adapters.put(name, body(file), headers), files))


@pytest.mark.parametrize("condition", [{"if-match": '"1"'}, {"if-none-match": "*"}])
def test_of_two_conditional_uploads_at_once_one_wins(
    adapters: Adapters, condition: dict[str, str]
) -> None:
    name = f"race-{next(iter(condition))}"
    if "if-match" in condition:
        assert adapters.put(name, adapters.file(10)).status_code == 201
    before = numbers(adapters, name)
    answers = at_once(adapters, name, [adapters.file(11), adapters.file(12)], condition)
    won, lost = sorted(answers, key=lambda answer: answer.status_code)
    assert won.status_code == 201
    assert_refused(lost, 412, "version_conflict")
    assert numbers(adapters, name) == [*before, won.json()["version"]]
    assert answered_by(ask(adapters, name)) == (won.json()["digest"], won.json()["version"])
    stored = {f"sha256:{path.name}" for path in adapters.blobs.iterdir() if path.is_file()}
    kept = {row["digest"] for row in adapters.versions(name)}
    assert kept <= stored
    assert not list((adapters.blobs / "incoming").iterdir())


def test_two_unconditional_uploads_at_once_are_both_versions(adapters: Adapters) -> None:
    answers = at_once(adapters, "both", [adapters.file(13), adapters.file(14)], {})
    assert [answer.status_code for answer in answers] == [201, 201]
    assert sorted(answer.json()["version"] for answer in answers) == [1, 2]
    for answer in answers:
        body = answer.json()
        reference = f"both@{body['version']}"
        assert answered_by(ask(adapters, reference)) == (body["digest"], body["version"])


def test_the_same_bytes_at_once_are_one_version(adapters: Adapters) -> None:
    answers = at_once(adapters, "twins", [adapters.file(15)] * 2, {})
    assert sorted(answer.status_code for answer in answers) == [200, 201]
    assert numbers(adapters, "twins") == [1]


# Under traffic.


def test_a_deleted_adapter_drains_and_its_admitted_requests_are_answered(
    adapters: Adapters,
) -> None:
    put = adapters.put("leaving", adapters.file(16)).json()
    blob = adapters.blobs / put["digest"].removeprefix("sha256:")
    with long_request(adapters, "leaving") as admitted:
        deleted = adapters.client.delete("/adapters/leaving")
        assert (deleted.status_code, deleted.json()["in_flight"]) == (202, 1)
        assert_refused(ask(adapters, "leaving"), 404, "adapter_not_found")
        assert_refused(adapters.client.delete("/adapters/leaving"), 404, "adapter_not_found")
        assert_refused(adapters.client.get("/adapters/leaving"), 404, "adapter_not_found")
        assert answered_by(admitted.result()) == (put["digest"], 1)
    wait_until(lambda: not blob.exists())
    again = adapters.put("leaving", adapters.file(16))
    assert (again.status_code, again.json()["version"]) == (201, 2)  # no number is given twice
    assert answered_by(ask(adapters, "leaving")) == (put["digest"], 2)


def test_an_unused_adapter_is_gone_with_its_delete(adapters: Adapters) -> None:
    put = adapters.put("unused", adapters.file(17)).json()
    before = adapters.stored()["slots"]["used_bytes"]
    assert adapters.client.post("/adapters/unused/load").status_code == 200
    deleted = adapters.client.delete("/adapters/unused")
    assert (deleted.status_code, deleted.json()["in_flight"]) == (200, 0)
    assert not (adapters.blobs / put["digest"].removeprefix("sha256:")).exists()
    assert adapters.stored()["slots"]["used_bytes"] == before
    assert_refused(adapters.client.delete("/adapters/unused"), 404, "adapter_not_found")


def test_one_version_is_deleted_and_the_others_stay(adapters: Adapters) -> None:
    first, second = (adapters.put("pair", adapters.file(seed)).json() for seed in (18, 19))
    with long_request(adapters, "pair@1") as admitted:
        deleted = adapters.client.delete("/adapters/pair/versions/1")
        assert (deleted.status_code, deleted.json()["in_flight"]) == (202, 1)
        missing = adapters.client.delete("/adapters/pair/versions/1")
        assert_refused(missing, 404, "version_not_found")
        assert answered_by(admitted.result()) == (first["digest"], 1)
    assert_refused(ask(adapters, "pair@1"), 404, "version_not_found")
    assert answered_by(ask(adapters, "pair")) == (second["digest"], 2)
    assert numbers(adapters, "pair") == [2]


def test_bytes_that_another_name_has_too_outlive_a_delete(adapters: Adapters) -> None:
    put = adapters.put("owner-a", adapters.file(20)).json()
    adapters.put("owner-b", adapters.file(20))
    answer = adapters.embeddings("owner-b")
    assert adapters.client.delete("/adapters/owner-a").status_code == 200
    assert (adapters.blobs / put["digest"].removeprefix("sha256:")).is_file()
    assert adapters.embeddings("owner-b") == answer


def test_a_swap_leaves_admitted_requests_their_version(adapters: Adapters) -> None:
    first = adapters.put("swapped", adapters.file(21)).json()
    with long_request(adapters, "swapped") as admitted:
        second = adapters.put("swapped", adapters.file(22)).json()
        assert answered_by(ask(adapters, "swapped")) == (second["digest"], 2)
        assert answered_by(admitted.result()) == (first["digest"], 1)


# Slots.


def post(adapters: Adapters, name: str, verb: str) -> tuple[int, dict[str, Any]]:
    answer = adapters.client.post(f"/adapters/{name}/{verb}")
    return answer.status_code, answer.json()


def test_load_pin_unpin_and_unload_answer_where_the_adapter_is(adapters: Adapters) -> None:
    put = adapters.put("placed", adapters.file(23)).json()
    entry = {"name": "placed", "version": 1, "digest": put["digest"]}
    state = {"resident": True, "pinned": False, "pin_held": False, "in_flight": 0}
    assert post(adapters, "placed", "load") == (200, entry | state)
    assert post(adapters, "placed", "pin") == (
        200,
        entry | state | {"pinned": True, "pin_held": True},
    )
    assert adapters.versions("placed")[0]["pinned"]
    assert post(adapters, "placed", "unpin") == (200, entry | state)
    assert post(adapters, "placed", "unload") == (200, entry | state | {"resident": False})
    assert post(adapters, "placed", "unload")[0] == 200
    assert answered_by(ask(adapters, "placed")) == (put["digest"], 1)  # it is loaded again


def test_unload_drains_the_requests_of_now(adapters: Adapters) -> None:
    put = adapters.put("draining", adapters.file(24)).json()
    with long_request(adapters, "draining") as admitted:
        status, body = post(adapters, "draining", "unload")
        assert (status, body["in_flight"]) == (202, 1)
        assert answered_by(admitted.result()) == (put["digest"], 1)
    wait_until(lambda: not adapters.versions("draining")[0]["resident"])
    status, body = post(adapters, "draining", "unload")
    assert (status, body["in_flight"]) == (200, 0)


def test_identical_bytes_under_another_name_show_and_take_nothing(adapters: Adapters) -> None:
    for name in ("same-mine", "same-theirs"):
        adapters.put(name, adapters.file(40))
    with long_request(adapters, "same-mine") as admitted:
        assert post(adapters, "same-mine", "pin")[1]["pinned"]
        mine, theirs = adapters.versions("same-mine")[0], adapters.versions("same-theirs")[0]
        assert (mine["pinned"], mine["in_flight"]) == (True, 1)
        states = {theirs[field] for field in ("resident", "pinned", "pin_held", "in_flight")}
        assert states == {False}
        for verb in ("unload", "unpin", "load", "unload"):
            assert post(adapters, "same-theirs", verb)[0] == 200
        assert adapters.client.delete("/adapters/same-theirs").status_code == 200
        assert answered_by(admitted.result()) == (mine["digest"], 1)
    after = adapters.versions("same-mine")[0]
    assert [after[field] for field in ("resident", "pinned", "pin_held")] == [True] * 3
    assert post(adapters, "same-mine", "unload")[1]["resident"] is False


@pytest.mark.parametrize("verb", ["load", "unload", "pin", "unpin", "verify"])
def test_what_is_not_there_can_be_neither_placed_nor_verified(
    adapters: Adapters, verb: str
) -> None:
    with adapters.unchanged():
        answer = adapters.client.post(f"/adapters/nowhere/{verb}")
        assert_refused(answer, 404, "adapter_not_found")
    if verb != "verify":
        with adapters.unchanged():
            answer = adapters.client.post(f"/adapters/plain@7/{verb}")
            assert_refused(answer, 404, "version_not_found")


# Aliases.


def test_an_alias_promotes_and_rolls_back(adapters: Adapters) -> None:
    digests = [adapters.put("moved", adapters.file(seed)).json()["digest"] for seed in (25, 26)]
    promoted = point(adapters, "moved", "stable", 1).json()
    assert promoted == {
        "name": "moved",
        "alias": "stable",
        "version": 1,
        "previous": None,
        "generation": 1,
    }
    assert answered_by(ask(adapters, "moved@stable")) == (digests[0], 1)
    assert point(adapters, "moved", "stable", 2, generation=1).json()["previous"] == 1
    assert answered_by(ask(adapters, "moved@stable")) == (digests[1], 2)
    back = point(adapters, "moved", "stable", 1, generation=2).json()
    assert (back["version"], back["previous"], back["generation"]) == (1, 2, 3)
    assert answered_by(ask(adapters, "moved@stable")) == (digests[0], 1)
    assert answered_by(ask(adapters, "moved")) == (digests[1], 2)
    shown = adapters.client.get("/adapters/moved").json()["aliases"]
    assert shown["stable"] == {"version": 1, "previous": 2, "generation": 3}
    assert shown["current"] == {"version": 2, "previous": 1, "generation": 2}


def test_a_stale_generation_or_a_missing_version_moves_no_alias(adapters: Adapters) -> None:
    adapters.put("kept", adapters.file(27))
    assert point(adapters, "kept", "stable", 1, generation=0).status_code == 200
    with adapters.unchanged():
        for generation in (0, 2):
            stale = point(adapters, "kept", "stable", 1, generation)
            assert_refused(stale, 412, "version_conflict")
        assert_refused(point(adapters, "kept", "new", 1, 1), 412, "version_conflict")
        assert_refused(point(adapters, "kept", "stable", 2), 404, "version_not_found")
        assert_refused(point(adapters, "nowhere", "stable", 1), 404, "adapter_not_found")
        assert_refused(ask(adapters, "kept@canary"), 404, "version_not_found")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"version": "1"},
        {"version": 1.0},
        {"version": 0},
        {"version": True},
        {"version": 10**30},
        {"version": 1, "more": 1},
        {"version": None},
        [],
    ],
)
def test_an_alias_body_is_strict(adapters: Adapters, body: Any) -> None:
    with adapters.unchanged():
        answer = adapters.client.put("/adapters/plain/aliases/stable", json=body)
        assert_refused(answer, 422, "validation_error")


def test_an_alias_of_a_deleted_version_leads_nowhere(adapters: Adapters) -> None:
    for seed in (28, 29):
        adapters.put("orphaned", adapters.file(seed))
    point(adapters, "orphaned", "stable", 1)
    adapters.client.delete("/adapters/orphaned/versions/1")
    assert_refused(ask(adapters, "orphaned@stable"), 404, "version_not_found")
    assert_refused(point(adapters, "orphaned", "stable", 1), 404, "version_not_found")
    assert point(adapters, "orphaned", "stable", 2, generation=2).status_code == 200
    assert answered_by(ask(adapters, "orphaned@stable"))[1] == 2


def test_who_did_what_and_when_is_told(adapters: Adapters) -> None:
    began = time.time()
    for seed in (30, 31):
        adapters.put("audited", adapters.file(seed))
    point(adapters, "audited", "stable", 1)
    adapters.client.delete("/adapters/audited/versions/1")
    audit = adapters.client.get("/adapters/audited").json()["audit"]
    assert [entry["action"] for entry in audit] == ["delete", "point", "put", "put"]
    assert {entry["who"] for entry in audit} == {"127.0.0.1"}
    assert all(began <= entry["at"] <= time.time() for entry in audit)
    assert audit[1]["detail"] == {"alias": "stable", "version": 1}


# The list.


def test_the_list_is_paged_by_name(adapters: Adapters) -> None:
    wanted = sorted(f"page/{i}" for i in range(7))
    for name in wanted:
        adapters.put(name, adapters.file(32))
    names: list[str] = []
    after: str | None = ""
    while after is not None:
        page = adapters.client.get("/adapters", params={"after": after, "limit": 3}).json()
        assert len(page["data"]) == 3 or page["next"] is None
        names += [row["name"] for row in page["data"]]
        after = page["next"]
    assert names == sorted(names)
    assert [name for name in names if name.startswith("page/")] == wanted
    whole = adapters.client.get("/adapters", params={"limit": 1000}).json()
    assert ([row["name"] for row in whole["data"]], whole["next"]) == (names, None)


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "1.5", "", "9" * 30])
def test_a_limit_is_1_to_1000(adapters: Adapters, limit: str) -> None:
    assert_refused(
        adapters.client.get("/adapters", params={"limit": limit}), 422, "validation_error"
    )


def test_a_row_tells_what_the_adapter_is_and_how_it_is_used(adapters: Adapters) -> None:
    put = adapters.put("row", adapters.file(33, ranks=3)).json()
    ask(adapters, "row")
    ask(adapters, "row@1")
    (row,) = adapters.client.get("/adapters", params={"after": "rov", "limit": 1}).json()["data"]
    assert row.pop("last_used") <= time.time()
    assert row.pop("created_at") == put["created_at"]
    assert row == {
        "name": "row",
        "version": 1,
        "aliases": {"current": {"version": 1, "previous": None, "generation": 1}},
        "versions": [1],
        "digest": put["digest"],
        "rank": 3,
        "bytes": put["bytes"],
        "resident": True,
        "in_flight": 0,
        "requests": 2,
    }


# A stop.


def test_a_draining_server_takes_no_upload_and_answers_the_rest(
    tiny_backbone: Path, serve: Serve, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    served = serve(
        tiny_backbone, "--data", data, "--drain-window-s", "600", "--import-root", tmp_path
    )
    with adapters_of(served, data) as adapters:
        answer = adapters.embeddings()
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: adapters.client.get("/ready").status_code == 503)
        assert_refused(adapters.client.get("/ready"), 503, "draining")
        with adapters.unchanged():
            refused = adapters.put("plain", adapters.file(34))
            assert_refused(refused, 503, "draining")
            assert int(refused.headers["retry-after"]) > 0
            body = {"lora_name": "plain", "lora_path": "x", "load_inplace": True}
            loaded = adapters.client.post("/v1/load_lora_adapter", json=body)
            assert (loaded.status_code, loaded.json()["error"]["code"]) == (503, "draining")
        assert adapters.client.get("/health").status_code == 200
        assert adapters.embeddings() == answer
    served.stop()  # a second signal ends the window


def test_a_draining_server_tells_kept_connections_to_close(
    tiny_backbone: Path, serve: Serve
) -> None:
    served = serve(tiny_backbone, "--drain-window-s", "600")
    with served.client() as client:
        assert "connection" not in client.post("/encode", json=QUESTION).headers
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/ready").status_code == 503)
        answer = client.post("/encode", json=QUESTION)
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    served.process.kill()
    served.process.wait()


def test_a_stopped_server_exits_with_0(tiny_backbone: Path, serve: Serve) -> None:
    assert serve(tiny_backbone, "--drain-window-s", "0.2").stop() == 0


# The difference of two.


def test_a_difference_is_of_the_versions_it_names_and_changes_nothing(adapters: Adapters) -> None:
    for seed in (31, 32):
        assert adapters.put("apart", adapters.file(seed)).status_code == 201
    first, second = (version["digest"] for version in adapters.versions("apart"))
    with adapters.unchanged():
        query = {"a": f"apart@{first[:19]}", "b": "apart"}
        answer = adapters.client.get("/diff", params=query).json()
    assert (answer["a"]["version"], answer["a"]["digest"]) == (1, first)
    assert (answer["b"]["version"], answer["b"]["digest"]) == (2, second)
    assert len(answer["weights"]) == 8
    assert all(place["difference"] > 0 for place in answer["weights"])


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({"a": "plain"}, 422, "validation_error"),
        ({"a": "", "b": "plain"}, 422, "validation_error"),
        ({"a": "plain", "b": "../plain"}, 422, "validation_error"),
        ({"a": "base", "b": "plain"}, 422, "validation_error"),
        ({"a": "plain", "b": "nothing"}, 404, "adapter_not_found"),
        ({"a": "plain@9", "b": "plain"}, 404, "version_not_found"),
    ],
)
def test_a_difference_of_what_is_not_there_is_refused(
    adapters: Adapters, query: dict[str, str], status: int, code: str
) -> None:
    with adapters.unchanged():
        assert_refused(adapters.client.get("/diff", params=query), status, code)


def test_a_difference_with_a_damaged_file_is_refused(adapters: Adapters) -> None:
    adapters.put("rotten", adapters.file(33))
    digest = adapters.versions("rotten")[0]["digest"].removeprefix("sha256:")
    adapters.blobs.joinpath(digest).write_bytes(b"something else")
    answer = adapters.client.get("/diff", params={"a": "plain", "b": "rotten"})
    assert_refused(answer, 404, "adapter_damaged")
    adapters.client.delete("/adapters/rotten")
