"""Sampled answers asked for again: the right ones pass, another adapter's do not."""

import dataclasses

import httpx
import pytest
from conftest import Served

from loadtest.adapter_file import AdapterMaker
from loadtest.answers import Sample, values_of
from loadtest.population import existing, open_client, passage_spans, populate, remove
from loadtest.reference import compare
from loadtest.workload import PASSAGE

PATHS = {"encode": "/encode", "critic": "/critic", "classify": "/classify"}


def sample(client: httpx.Client, kind: str, adapter: str | None) -> Sample:
    body = {"adapter": adapter or "base", "inputs": "to be or not"}
    row = client.post(PATHS[kind], json=body).raise_for_status().json()["data"][0]
    entry = row["adapter"] or {"name": None, "digest": None}
    return Sample(kind, body["inputs"], entry["name"], entry["digest"], values_of(kind, row))


@pytest.mark.parametrize("kind", PATHS)
def test_a_row_of_another_adapter_is_found(tiny_server: Served, kind: str) -> None:
    with open_client(tiny_server.url, None) as client:
        info = client.get("/info").json()
        maker = AdapterMaker(info["config"], info["backbone"]["digest"], rank=4)
        catalogue = populate(client, maker, "ref/a", 2, seed=1, said=lambda _: None)
        first, second = (sample(client, kind, name) for name in catalogue.names)
        right = compare(client, [first, second], info["dtype"])
        mixed_up = dataclasses.replace(first, values=second.values)
        wrong = compare(client, [first, mixed_up], info["dtype"])
        remove(client, catalogue)
    assert (right.compared, right.wrong) == (2, 0)
    assert (wrong.compared, wrong.wrong) == (2, 1)
    assert right.tells_adapters_apart is (True if kind == "encode" else None)


def test_the_trunk_alone_has_a_reference_too(tiny_server: Served) -> None:
    with open_client(tiny_server.url, None) as client:
        comparison = compare(client, [sample(client, "encode", None)], "float32")
    assert (comparison.compared, comparison.wrong) == (1, 0)


def test_the_same_seed_makes_the_same_file_and_another_seed_another(tiny_server: Served) -> None:
    with tiny_server.client() as client:
        info = client.get("/info").json()
    maker = AdapterMaker(info["config"], info["backbone"]["digest"], rank=4)
    assert maker.file(1) == maker.file(1) != maker.file(2)


def test_adapters_that_are_there_are_asked_only_what_they_can_answer(tiny_server: Served) -> None:
    with open_client(tiny_server.url, None) as client:
        catalogue = existing(client, ["plain", "full"])
    assert "classify" not in catalogue.entries["plain"].kinds
    assert catalogue.names_of("classify") == ["full"]
    assert catalogue.names_of("critic") == ["plain", "full"]


def test_a_vocabulary_that_can_write_the_passage_gives_its_tokens(tiny_server: Served) -> None:
    with open_client(tiny_server.url, None) as client:
        spans = passage_spans(client)
    assert spans == [(i, i + 1) for i in range(len(PASSAGE))]  # a character is a token
