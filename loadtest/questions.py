"""Requests of every kind, with what their answers must say."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from loadtest.catalogue import Catalogue
from loadtest.workload import Bursts, Lengths, Passage, Popularity, random_ids

KINDS = ("encode", "critic", "classify", "fan-out", "openai")
DEFAULT_MIX = {"encode": 50, "critic": 15, "classify": 15, "fan-out": 5, "openai": 15}
PATHS = {
    "encode": "/encode",
    "critic": "/critic",
    "classify": "/classify",
    "fan-out": "/encode",
    "openai": "/v1/embeddings",
}
FAN_OUT = 4  # adapters of one request
BARE_SHARE, VERSION_SHARE = 0.8, 0.1  # of references; the rest are digests
Text = str | list[int]


@dataclass(frozen=True)
class Reference:
    """How an adapter is asked for. digest None: whatever the bare name means; name None: none."""

    text: str
    name: str | None = None
    digest: str | None = None


BASE = Reference("base")


@dataclass(frozen=True)
class Question:
    """One request. references[i] is what row i of the answer is asked under, texts[i] its input."""

    kind: str
    body: bytes
    references: Sequence[Reference]
    texts: Sequence[Text]
    sampled: bool
    path: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", PATHS[self.kind])


@dataclass
class Questioner:
    """Draws questions: the same ones in the same order from the same rng and times."""

    catalogue: Catalogue
    popularity: Popularity
    lengths: Lengths
    bursts: Bursts
    passage: Passage | None  # None: random ids of `vocabulary`
    vocabulary: Sequence[int]
    base_share: float
    sample_share: float
    texts: int  # of an /encode request with several of them
    texts_share: float  # of /encode requests with several texts

    def draw(self, kind: str, rng: random.Random, at: float) -> Question:
        """A request of `kind` as it would come `at` seconds after the beginning."""
        sampled = rng.random() < self.sample_share
        if kind == "fan-out":
            references = [self._reference(kind, rng, at) for _ in range(FAN_OUT)]
            text = self._text(rng)
            body = {"adapters": [r.text for r in references], "inputs": text}
            body |= {"encoding_format": "base64"}
            return Question(kind, orjson.dumps(body), references, [text] * FAN_OUT, sampled)
        several = kind == "encode" and rng.random() < self.texts_share
        texts = [self._text(rng) for _ in range(self.texts if several else 1)]
        reference = self._reference(kind, rng, at)
        body = _body(kind, reference.text, texts)
        return Question(kind, orjson.dumps(body), [reference] * len(texts), texts, sampled)

    def _text(self, rng: random.Random) -> Text:
        length = self.lengths.draw(rng)
        if self.passage is None:
            return random_ids(rng, length, self.vocabulary)
        return self.passage.cut(rng, length)

    def _reference(self, kind: str, rng: random.Random, at: float) -> Reference:
        names = self.catalogue.names_of(kind)
        # Only adapters have classifiers
        if not names or (kind != "classify" and rng.random() < self.base_share):
            return BASE
        name = names[self.popularity.draw(rng, at) % len(names)]
        form = rng.random()
        if form < BARE_SHARE:
            return Reference(name, name)
        version, digest = rng.choice(self.catalogue.versions(name))
        suffix = str(version) if form < BARE_SHARE + VERSION_SHARE else digest
        return Reference(f"{name}@{suffix}", name, digest)


def _body(kind: str, reference: str, texts: list[Text]) -> dict[str, Any]:
    inputs: Any = texts if len(texts) > 1 or isinstance(texts[0], list) else texts[0]
    if kind == "openai":
        return {"model": reference, "input": inputs, "encoding_format": "base64"}
    body = {"adapter": reference, "inputs": inputs}
    return body | ({"encoding_format": "base64"} if kind == "encode" else {})
