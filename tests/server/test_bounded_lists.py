"""Lists and documents of adapters are bounded: metadata at upload, pages of versions and names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_client import Adapters, adapters_of
from bad_files import set_bytes
from conftest import Serve

from adapters import version_pages
from adapters.records import ParsedTexts
from adapters.validate import MAX_METADATA


@pytest.fixture(scope="module")
def adapters(
    tiny_backbone: Path, serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapters]:
    data = tmp_path_factory.mktemp("lists")
    served = serve_for_session(tiny_backbone, "--data", data)
    with adapters_of(served, data) as adapters:
        yield adapters


def test_metadata_is_capped_at_upload_and_labels_do_not_count(adapters: Adapters) -> None:
    """A stored file with more stays served: only uploads are judged."""

    def noted(size: int, **options: int) -> bytes:
        return set_bytes(adapters.digest, metadata={"note": "x" * size}, **options)

    refused = adapters.put("noted", noted(MAX_METADATA))
    assert refused.status_code == 422
    assert refused.json()["error"]["details"]["reason"] == "metadata_too_large"
    taken = adapters.put("noted", noted(MAX_METADATA - 1000, classes=6000))
    assert taken.status_code == 201, taken.text


def test_versions_come_in_pages_and_all_of_them_by_default(adapters: Adapters) -> None:
    for seed in range(5):
        assert adapters.put("paged", adapters.file(seed)).status_code == 201
    assert adapters.client.delete("/adapters/paged/versions/3").status_code == 200
    whole = adapters.client.get("/adapters/paged").json()
    assert [version["version"] for version in whole["versions"]] == [1, 2, 4, 5]
    assert whole["versions_next"] is None
    found, after = [], 0
    while after is not None:
        params = {"versions_limit": "2", "versions_after": str(after)}
        page = adapters.client.get("/adapters/paged", params=params).json()
        assert len(page["versions"]) <= 2
        found += page["versions"]
        after = page["versions_next"]
    assert found == whole["versions"]
    for bad in ("0", "1001", "x"):
        answer = adapters.client.get("/adapters/paged", params={"versions_limit": bad})
        assert answer.status_code == 422


def test_a_page_of_versions_ends_by_the_bytes_of_their_records(
    monkeypatch: pytest.MonkeyPatch, adapters: Adapters
) -> None:
    assert version_pages.PAGE_BYTES >= 1 << 20  # one record fits in any case
    sizes = [(1, 60), (2, 60), (3, 60)]
    monkeypatch.setattr(version_pages, "PAGE_BYTES", 130)
    monkeypatch.setattr(version_pages, "_versions", lambda rows, name, after, last: [])
    _, more, total = version_pages.version_page(lambda *_: sizes, "a", 0, 10)
    assert (more, total) == (2, 120)
    _, more, _ = version_pages.version_page(lambda *_: [(1, 500)], "a", 0, 10)
    assert more is None


def test_a_page_of_names_ends_by_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_pages, "PAGE_NUMBERS", 10)
    counts = {"a": 4, "b": 5, "c": 6, "d": 1}
    assert version_pages.within_a_page(lambda *_: list(counts.items()), list(counts)) == ["a", "b"]
    assert version_pages.within_a_page(lambda *_: [("a", 99)], ["a", "d"]) == ["a"]


def test_records_are_remembered_within_a_bound() -> None:
    parsed: list[str] = []

    def parse(text: str) -> int:
        parsed.append(text)
        return len(text)

    cache = ParsedTexts(parse, 10)
    assert [cache(text) for text in ("aaaa", "bbbb", "aaaa")] == [4, 4, 4]
    assert parsed == ["aaaa", "bbbb"]
    assert cache("cccc") == 4  # bbbb, the longest unused, is forgotten
    assert len(cache) == 2
    assert cache("aaaa") == 4
    assert cache("d" * 20) == 20  # too large to be kept
    assert len(cache) == 2  # and drives none of the others out
    assert parsed == ["aaaa", "bbbb", "cccc", "d" * 20]
