"""What counts as a wrong answer."""

import json
import random
from typing import Any

import pytest

from loadtest.answers import check
from loadtest.catalogue import Catalogue, Entry
from loadtest.questions import KINDS, Question, Questioner, Reference
from loadtest.workload import PASSAGE, Bursts, Lengths, Passage, Popularity

ADAPTER = {"name": "a", "version": 1, "digest": "sha256:1"}


def question(*references: Reference, kind: str = "encode") -> Question:
    return Question(kind, b"", references, ["text"] * len(references), sampled=True)


def answer(*adapters: dict[str, Any] | None, **row: Any) -> bytes:
    row = row or {"embedding": [0.6, 0.8]}
    data = [{"index": i, "adapter": adapter} | row for i, adapter in enumerate(adapters)]
    return json.dumps({"data": data, "usage": {"total_tokens": 7}}).encode()


BARE, PINNED = Reference("a", "a"), Reference("a@1", "a", "sha256:1")


def test_what_was_asked_for_is_right_and_its_bare_names_are_judged_later() -> None:
    verdict = check(question(BARE, PINNED), 200, answer(ADAPTER, ADAPTER))
    assert verdict.fault is None
    assert verdict.tokens == 7
    assert verdict.served == [("a", "sha256:1")]
    assert verdict.sample is not None
    assert verdict.sample.values == [0.6, 0.8]


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ([PINNED], answer(ADAPTER | {"digest": "sha256:2"})),
        ([BARE], answer(ADAPTER | {"name": "b"})),
        ([BARE], answer(None)),
        ([Reference("base")], answer(ADAPTER)),
        ([BARE, BARE], answer(ADAPTER)),
        ([BARE], answer(ADAPTER, embedding=[float("nan"), 1.0])),
        ([BARE], b"{}"),
        ([BARE], b"not JSON"),
    ],
)
def test_anything_else_is_wrong(asked: list[Reference], sent: bytes) -> None:
    fault = check(question(*asked), 200, sent).fault
    assert fault is not None
    assert fault.startswith("wrong")


def test_a_refusal_is_a_failure_by_its_code() -> None:
    body = b'{"error": {"code": "overloaded", "message": "full"}}'
    assert check(question(BARE), 503, body).fault == "503 overloaded"
    assert check(question(BARE), 0, b"").fault == "no answer"


@pytest.mark.parametrize("kind", KINDS)
def test_questions_of_every_kind_ask_under_what_they_expect(kind: str) -> None:
    catalogue = Catalogue()
    for name in ("a", "b", "c"):
        catalogue.add(Entry(name, {1: f"sha256:{name}1", 2: f"sha256:{name}2"}, frozenset(KINDS)))
    questioner = Questioner(
        catalogue,
        Popularity(3, 1.0, 0.0, seed=1),
        Lengths(),
        Bursts(0, 1, 1, 1),
        Passage(PASSAGE, [(i, i + 1) for i in range(len(PASSAGE))]),
        [],
        base_share=0.2,
        sample_share=0.5,
        texts=4,
        texts_share=0.2,
    )
    rng, forms = random.Random(1), set()
    for _ in range(300):
        drawn = questioner.draw(kind, rng, 0.0)
        body = json.loads(drawn.body)
        asked = body.get("adapters") or [body.get("adapter", body.get("model"))]
        assert set(asked) == {reference.text for reference in drawn.references}
        for reference in drawn.references:
            name, _, suffix = reference.text.partition("@")
            forms.add("base" if reference.name is None else suffix[:3])
            assert reference.name in (None, name)
            if suffix and not suffix.startswith("sha256:"):
                assert reference.digest == f"sha256:{name}{suffix}"
            elif suffix:
                assert reference.digest == suffix
    assert forms == {"", "1", "2", "sha"} | (set() if kind == "classify" else {"base"})
