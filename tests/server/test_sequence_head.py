"""Adapters with a sequence head or a CLS embedding of their own: PUT, asked, mixed, evicted."""

import dataclasses
from collections.abc import Iterator

import httpx
import pytest
from click.testing import CliRunner
from conftest import TINY, Serve, Served, random_adapter, random_gpt
from conftest import tiny_tokenizer as tokenizer
from reference import Oracle

from adapters.format import adapter_bytes, write_adapter
from model.checkpoint import backbone_tensors, read_backbone, write_backbone
from server.cli import main

# A trunk with a critic, a CLS embedding and a sequence head; and one that has a [CLS] token alone.
PLAIN = dataclasses.replace(TINY, add_critic_head=False)
HEADS = {
    "none": {},
    "head": {"sequence": True},
    "cls": {"cls": True},
    "both": {"sequence": True, "cls": True, "norms": True},
    "judge": {"sequence": True, "cls": True, "critic": True},
}
ROWS = ["[CLS]To be, or not to be", "To be", "[CLS]", "a[CLS]b", "[CLS][PAD]!"]


@dataclasses.dataclass(frozen=True)
class Case:
    oracle: Oracle
    client: httpx.Client


@pytest.fixture(scope="module", params=["with heads", "without heads"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    """The shared server, whose trunk has all heads, or one whose trunk has none, with two slots;
    every adapter is PUT."""
    folder = tmp_path_factory.mktemp("scorers") / "trunk"
    if request.param == "with heads":
        served: Served = request.getfixturevalue("tiny_server")
        config, tensors = TINY, read_backbone(request.getfixturevalue("tiny_backbone")).tensors
    else:
        config = PLAIN
        tensors = backbone_tensors(config, random_gpt(config, 3).state_dict())
        tensors = {n: t for n, t in tensors.items() if not n.startswith(("sequence", "cls"))}
    digest = write_backbone(folder, config, tensors, tokenizer())
    if request.param == "without heads":
        serve: Serve = request.getfixturevalue("serve_for_session")
        served = serve(folder, "--dtype", "float32", "--slots", "2")
    for seed, (name, heads) in enumerate(HEADS.items()):
        write_adapter(
            folder / "adapters" / f"{name}.safetensors",
            random_adapter(config, seed, **heads),
            lora_alpha=8.0,
            base_digest=digest,
        )
    oracle = Oracle(folder)
    with served.client() as client:
        for name, adapter in oracle.sets.items():
            file = adapter_bytes(adapter.tensors, adapter.metadata)
            headers = {"content-type": "application/octet-stream"}
            answer = client.put(f"/adapters/{name}", content=file, headers=headers)
            assert answer.status_code == 201, answer.text
            applied = answer.json()["applied"]
            assert applied["sequence_head"] == ("sequence" in HEADS[name])
            assert applied["cls_embedding"] == ("cls" in HEADS[name])
        yield Case(oracle, client)
        for name in oracle.sets:
            assert client.delete(f"/adapters/{name}").status_code == 200


def scored(oracle: Oracle, name: str) -> bool:
    return "sequence_head.A" in oracle.sets[name].tensors or oracle.has_sequence_head


def test_each_row_has_the_score_of_its_own_adapter_s_head_in_one_mixed_request(
    case: Case,
) -> None:
    """Twice, through two slots: an evicted adapter comes back with its head and CLS embedding."""
    names = [name for name in HEADS if case.oracle.has_critic or name == "judge"]
    for _ in range(2):
        answer = case.client.post("/critic", json={"adapters": names, "inputs": ROWS})
        assert answer.status_code == 200, answer.text
        for number, row in enumerate(answer.json()["data"]):
            text, name = ROWS[number // len(names)], names[number % len(names)]
            ids = case.oracle.ids(text)
            logits = [token["logit"] for token in row["tokens"]]
            assert logits == pytest.approx(case.oracle.critic(ids, name).tolist(), abs=1e-4)
            if text.startswith("[CLS]") and scored(case.oracle, name):
                expected = case.oracle.sequence_score(ids, name)
                assert row["sequence_score"] == pytest.approx(expected, abs=1e-5)
            else:
                assert row["sequence_score"] is None


def test_without_any_critic_a_sequence_head_still_scores_rows_led_by_cls(
    case: Case,
) -> None:
    if case.oracle.has_critic:
        pytest.skip("this trunk has a critic")
    led = [text for text in ROWS if text.startswith("[CLS]")]
    rows = case.client.post("/critic", json={"adapters": ["head", "both"], "inputs": led}).json()[
        "data"
    ]
    for number, row in enumerate(rows):
        ids, name = case.oracle.ids(led[number // 2]), ("head", "both")[number % 2]
        score = case.oracle.sequence_score(ids, name)
        assert row["sequence_score"] == pytest.approx(score, abs=1e-5)
        assert row["score"] is None
        assert [token["logit"] for token in row["tokens"]] == [None] * len(ids)
    encoded = case.client.post(
        "/encode", json={"adapter": "head", "inputs": led, "outputs": ["critic"]}
    )
    assert [row["critic"]["sequence_score"] for row in encoded.json()["data"]] == [
        row["sequence_score"] for row in rows[::2]
    ]
    score = f"{rows[0]['sequence_score']:.4f}"
    for command, shown in (
        (["critic", led[0]], ["score none", f"sequence score {score}", "no critic judged"]),
        (["encode", led[0], "--output", "critic"], ["none"]),
    ):
        for terminal in ({}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}):
            environment = {"TRUNKLINE_URL": str(case.client.base_url)} | terminal
            done = CliRunner().invoke(main, [*command, "--adapter", "head"], env=environment)
            assert done.exit_code == 0, done.output
            assert terminal or all(words in done.output for words in shown)
    for name, inputs in (("head", ROWS), ("head", "To be"), ("cls", led), (None, led)):
        answer = case.client.post("/critic", json={"adapter": name, "inputs": inputs})
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "critic_not_available"


def test_the_states_of_a_row_led_by_cls_have_the_adapter_s_own_embedding(
    case: Case,
) -> None:
    body = {"adapters": list(HEADS), "inputs": ROWS, "outputs": ["tokens"]}
    for number, row in enumerate(case.client.post("/encode", json=body).json()["data"]):
        ids, name = case.oracle.ids(ROWS[number // len(HEADS)]), list(HEADS)[number % len(HEADS)]
        for token, state in zip(row["tokens"], case.oracle.hidden(ids, name), strict=True):
            assert token["hidden"] == pytest.approx(state.tolist(), rel=1e-4, abs=5e-5)
