"""The demo's figures, as its server answers: python -m model.demo.evaluate DATA --url URL --out DIR

DATA is the folder of model/demo/tasks.py. OUT gets evaluation.md and evaluation.json. Each figure
has a 95 % interval of 1,000 bootstrap samples of the test rows. Needs the extra `demo`.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import torch
from rich.progress import track
from sklearn.metrics import f1_score

from model.demo import baselines
from model.metrics import area_under_roc, average_precision, expected_calibration_error

ROWS = 64  # of a request
SAMPLES = 1000
TOKEN_SAMPLES = 200  # of measures that sort every token
MASK_SHARE = 0.15
FILL_TOP = 1000  # tokens that a filled one is sampled from
WINDOW_TRAIN = 9000  # rows, as in the data set's own baseline

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    task: str
    of: str
    measure: str
    value: float
    low: float
    high: float


class Served:
    """The endpoints, a few rows a request."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def ask(self, path: str, inputs: Sequence[Any], **body: Any) -> Rows:
        """The answers' `data`, in the order of `inputs`."""
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        answers: Rows = [{}] * len(inputs)
        for start in track(range(0, len(order), ROWS), f"{path} {body}", transient=True):
            part = order[start : start + ROWS]
            response = self.client.post(path, json=body | {"inputs": [inputs[i] for i in part]})
            if response.is_error:
                raise click.ClickException(f"{path}: {response.text}")
            for i, row in zip(part, response.json()["data"], strict=True):
                answers[i] = row
        return answers

    def embed(self, texts: Sequence[str], adapter: str) -> np.ndarray:
        """(N, C) rows of length 1."""
        rows = self.ask("/encode", texts, adapter=adapter)
        return np.array([row["embedding"] for row in rows], dtype=np.float32)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self.ask("/tokenize", texts)
        return [[token["id"] for token in row["tokens"]] for row in rows]

    def mask_token_id(self) -> int:
        return int(self.client.get("/info").json()["config"]["mask_token_id"])


def interval(
    rows: int, measure: Callable[[np.ndarray], float], samples: int = SAMPLES
) -> tuple[float, float, float]:
    """measure of all rows' indices, and the 2.5 % and 97.5 % quantiles over bootstrap samples."""
    dice = np.random.default_rng(0)
    values = [measure(dice.integers(0, rows, rows)) for _ in range(samples)]
    low, high = np.quantile(values, (0.025, 0.975))
    return measure(np.arange(rows)), float(low), float(high)


def labels_figures(task: str, of: str, truth: Sequence[str], guess: Sequence[str]) -> list[Figure]:
    names = sorted({*truth, *guess})
    t, g = (np.array([names.index(label) for label in column]) for column in (truth, guess))
    accuracy = interval(len(t), lambda rows: float((t[rows] == g[rows]).mean()))
    macro = interval(
        len(t),
        lambda rows: float(f1_score(t[rows], g[rows], average="macro", zero_division=0)),
        TOKEN_SAMPLES,
    )
    return [Figure(task, of, "accuracy", *accuracy), Figure(task, of, "macro-F1", *macro)]


def classifier(served: Served, task: str, train: Rows, test: Rows) -> list[Figure]:
    texts, truth = [r["text"] for r in test], [r["label"] for r in test]
    known, labels = [r["text"] for r in train], [r["label"] for r in train]
    answers = served.ask("/classify", texts, adapter=task, top_k=1)
    own = [answer["labels"][0]["label"] for answer in answers]
    rows, test_rows = served.embed(known, "base"), served.embed(texts, "base")
    return [
        *labels_figures(task, "adapter", truth, own),
        *labels_figures(
            task, "bare trunk + LR", truth, baselines.linear_labels(rows, labels, test_rows)
        ),
        *labels_figures(task, "TF-IDF + LR", truth, baselines.tfidf_labels(known, labels, texts)),
    ]


def ranks_figures(task: str, of: str, ranks: np.ndarray) -> list[Figure]:
    first = interval(len(ranks), lambda rows: float((ranks[rows] == 1).mean()))
    mrr = interval(len(ranks), lambda rows: float((1 / ranks[rows]).mean()))
    return [Figure(task, of, "recall@1", *first), Figure(task, of, "MRR", *mrr)]


def verses(served: Served, task: str, train: Rows, test: Rows) -> list[Figure]:
    left, right = [r["kjv"] for r in test], [r["web"] for r in test]
    figures = []
    for of, adapter in (("adapter", "verses"), ("bare trunk", "base")):
        scores = served.embed(left, adapter) @ served.embed(right, adapter).T
        figures += ranks_figures(task, of, baselines.ranks(scores))
    known = [r[side] for r in train for side in ("kjv", "web")]
    return figures + ranks_figures(task, "TF-IDF", baselines.tfidf_ranks(known, left, right))


def words_of(row: dict[str, Any]) -> tuple[list[tuple[int, int]], list[bool]]:
    """Character ranges of a KJV verse's words, and whether its translators added them."""
    found = [word.span() for word in re.finditer(r"\S+", row["kjv"])]
    return found, [any(a < y and x < b for x, y in row["added"]) for a, b in found]


def translators(served: Served, train: Rows, test: Rows) -> list[Figure]:
    """Average precision over words: a word scores as its most suspicious token."""
    words = [words_of(row) for row in test]
    hits = [torch.tensor(found) for _, found in words]
    figures = []
    for of, adapter in (("adapter", "translators"), ("bare trunk", "base")):
        answers = served.ask("/critic", [row["kjv"] for row in test], adapter=adapter)
        scores = [
            torch.tensor([_score(a, b, answer["tokens"]) for a, b in found])
            for (found, _), answer in zip(words, answers, strict=True)
        ]
        figures.append(_precision(of, hits, scores))
    texts = [
        [
            ([row["kjv"][a:b] for a, b in found], hit)
            for row in rows
            for found, hit in [words_of(row)]
        ]
        for rows in (train[:WINDOW_TRAIN], test)
    ]
    flat = baselines.window_scores(*texts)
    parts = torch.split(flat, [len(h) for h in hits])
    return [*figures, _precision("window LR", hits, parts)]


def _score(start: int, end: int, tokens: Rows) -> float:
    return max(float(t["logit"]) for t in tokens if t["start"] < end and start < t["end"])


def _precision(of: str, hits: Sequence[torch.Tensor], scores: Sequence[torch.Tensor]) -> Figure:
    def measure(rows: np.ndarray) -> float:
        truth, score = (torch.cat([column[i] for i in rows]) for column in (hits, scores))
        return average_precision(truth, score)

    return Figure(
        "translators", of, "average precision", *interval(len(hits), measure, TOKEN_SAMPLES)
    )


def mask(ids: Sequence[Sequence[int]], mask_token_id: int) -> list[tuple[list[int], list[int]]]:
    """Each row with MASK_SHARE of its tokens masked, one at least, and where."""
    dice = np.random.default_rng(0)
    rows = []
    for row in ids:
        count = max(1, round(MASK_SHARE * len(row)))
        asked = sorted(dice.choice(len(row), count, replace=False).tolist())
        masked = list(row)
        for place in asked:
            masked[place] = mask_token_id
        rows.append((masked, asked))
    return rows


def scripture(served: Served, test: Rows) -> list[Figure]:
    ids = served.token_ids([row["text"] for row in test])
    masked = mask(ids, served.mask_token_id())
    figures = []
    for of, adapter in (("adapter", "scripture"), ("bare trunk", "base")):
        answers = served.ask(
            "/encode", [row for row, _ in masked], adapter=adapter, outputs=["logits"], top_k=1
        )
        hits = np.array(
            [
                sum(a["top"][0]["id"] == row[a["position"]] for a in answer["logits"])
                for row, answer in zip(ids, answers, strict=True)
            ]
        )
        figures.append(_share(of, hits, np.array([len(asked) for _, asked in masked])))
    return figures


def _share(of: str, hits: np.ndarray, counts: np.ndarray) -> Figure:
    value = interval(len(hits), lambda rows: float(hits[rows].sum() / counts[rows].sum()))
    return Figure("scripture", of, "masked accuracy", *value)


def critic(served: Served, texts: Sequence[str]) -> list[Figure]:
    """The trunk's critic on rows with some tokens replaced: by samples of the trunk's own
    predictions, as in training, and by tokens drawn from the texts."""
    ids = served.token_ids(texts)
    masked = mask(ids, served.mask_token_id())
    judged = _judged(served, ids, _sampled(served, ids, masked))
    drawn = _judged(served, ids, _drawn(ids, masked))
    ece = "calibration error"
    return [
        judged.figure("its own samples", "AUC", area_under_roc, judged.logits),
        drawn.figure("tokens drawn from the texts", "AUC", area_under_roc, drawn.logits),
        judged.figure("before its table", ece, expected_calibration_error, judged.unfitted),
        judged.figure("after its table", ece, expected_calibration_error, judged.wrongness),
    ]


Masked = Sequence[tuple[list[int], list[int]]]  # of each row its masked ids, and where


def _sampled(served: Served, ids: Sequence[list[int]], masked: Masked) -> list[list[int]]:
    answers = served.ask(
        "/encode", [row for row, _ in masked], adapter="base", outputs=["logits"], top_k=FILL_TOP
    )
    dice = np.random.default_rng(1)
    filled = []
    for row, answer in zip(ids, answers, strict=True):
        new = list(row)
        for asked in answer["logits"]:
            p = np.exp([top["logprob"] for top in asked["top"]])
            new[asked["position"]] = asked["top"][dice.choice(len(p), p=p / p.sum())]["id"]
        filled.append(new)
    return filled


def _drawn(ids: Sequence[list[int]], masked: Masked) -> list[list[int]]:
    dice, all_ids = np.random.default_rng(2), np.concatenate([np.array(row) for row in ids])
    filled = [list(row) for row in ids]
    for row, (_, asked) in zip(filled, masked, strict=True):
        for position in asked:
            row[position] = int(dice.choice(all_ids))
    return filled


@dataclass(frozen=True)
class Judged:
    """Of each row, a token each: whether it was replaced, the critic's logit, its wrongness."""

    wrong: Sequence[torch.Tensor]
    logits: Sequence[torch.Tensor]
    wrongness: Sequence[torch.Tensor]

    @property
    def unfitted(self) -> list[torch.Tensor]:
        return [logits.sigmoid() for logits in self.logits]

    def figure(self, of: str, name: str, measure: Any, scores: Sequence[torch.Tensor]) -> Figure:
        def at(rows: np.ndarray) -> float:
            truth, score = (torch.cat([column[i] for i in rows]) for column in (self.wrong, scores))
            return float(measure(truth, score))

        return Figure("critic", of, name, *interval(len(self.wrong), at, TOKEN_SAMPLES))


def _judged(served: Served, ids: Sequence[list[int]], filled: Sequence[list[int]]) -> Judged:
    wrong = [
        torch.tensor([a != b for a, b in zip(x, y, strict=True)])
        for x, y in zip(ids, filled, strict=True)
    ]
    answers = served.ask("/critic", filled, adapter="base")
    columns = (
        [torch.tensor([token[name] for token in row["tokens"]]) for row in answers]
        for name in ("logit", "wrongness")
    )
    return Judged(wrong, *columns)


def table(figures: Sequence[Figure]) -> str:
    lines = ["| task | of | measure | value | 95 % interval |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {f.task} | {f.of} | {f.measure} | {f.value:.3f} | {f.low:.3f} to {f.high:.3f} |"
        for f in figures
    ]
    return "\n".join(lines) + "\n"


def read(path: Path, limit: int | None) -> Rows:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--url", default="http://127.0.0.1:8000")
@click.option("--out", type=click.Path(path_type=Path), default=Path("."))
@click.option("--limit", type=int, help="Test rows of each task, the first.")
@click.option("--train-limit", type=int, help="Training rows of the baselines, the first.")
@click.option("--held-out", default=0.01, help="Share of the corpus the trunk was not trained on.")
def main(
    data: Path, url: str, out: Path, limit: int | None, train_limit: int | None, held_out: float
) -> None:
    """Measure the server at URL, which serves the demo, on the rows under DATA."""
    train, test = (
        {
            task: read(data / f"{task}_{part}.jsonl", most)
            for task in ("supersense", "era", "verses", "translators", "scripture")
        }
        for part, most in (("train", train_limit), ("test", limit))
    )
    hard = read(data / "verses_hard_test.jsonl", limit)
    corpus = (data / "corpus.txt").read_text("utf-8").splitlines()
    kept = corpus[-max(1, round(held_out * len(corpus))) :][1::2]  # the others made its table
    with httpx.Client(base_url=url, timeout=600) as client:
        served = Served(client)
        figures = [
            *classifier(served, "supersense", train["supersense"], test["supersense"]),
            *classifier(served, "era", train["era"], test["era"]),
            *verses(served, "verses", train["verses"], test["verses"]),
            *verses(served, "verses without names", train["verses"], hard),
            *translators(served, train["translators"], test["translators"]),
            *scripture(served, test["scripture"]),
            *critic(served, kept[:limit]),
        ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.md").write_text(table(figures), "utf-8")
    lines = json.dumps([asdict(figure) for figure in figures], indent=1)
    (out / "evaluation.json").write_text(lines + "\n", "utf-8")
    click.echo(table(figures))


if __name__ == "__main__":
    main()
