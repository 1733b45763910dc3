"""The tasks an adapter can be trained for: labels and scores of texts, pairs of texts, labels of
tokens."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.batches import Batch, Example
from model.corpus import Row, tokens_of
from model.gpt import GPT
from model.masked import Masked
from model.metrics import area_under_roc, average_precision, macro_f1, retrieval
from model.objective import Loss, Objective
from model.tokenizer import Tokenizer

TEMPERATURE = 0.05  # of the contrastive softmax (SimCSE, section 3)


class Classify(Objective):
    """A linear classifier on the pooled row."""

    fields = ("text", "label")

    def __init__(self, gpt: GPT, labels: Sequence[str]) -> None:
        super().__init__(gpt)
        self.labels = list(labels)
        self.classifier = nn.Linear(gpt.config.n_embd, len(labels))
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def example(self, row: Row, names: Sequence[str], tokenizer: Tokenizer) -> Example:
        ids = tokens_of(row, names[0], tokenizer, self.gpt.config.block_size).ids
        label = row.text(names[1])
        if label not in self.labels:
            raise row.error(f"the label {label!r} does not occur in training")
        return Example((ids,), self.labels.index(label))

    def loss(self, batch: Batch, share: float) -> Loss:
        loss = F.cross_entropy(self._logits(batch), self._classes(batch))
        return loss, {}

    def measure(self, batches: Iterator[Batch]) -> dict[str, float]:
        pairs = [(self._classes(batch), self._logits(batch).argmax(-1)) for batch in batches]
        truth, guess = (torch.cat(column) for column in zip(*pairs, strict=True))
        return {
            "accuracy": (truth == guess).double().mean().item(),
            "macro_f1": macro_f1(truth, guess, len(self.labels)),
        }

    def _logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self.classifier(self.pooled(batch.ids))
        return logits.float()

    def _classes(self, batch: Batch) -> Tensor:
        return torch.tensor([example.target for example in batch.examples])


class Pairs(Objective):
    """Both texts of a pair near each other and far from the batch's others (InfoNCE, both ways)."""

    fields = ("left", "right")

    def example(self, row: Row, names: Sequence[str], tokenizer: Tokenizer) -> Example:
        room = self.gpt.config.block_size
        return Example(tuple(tokens_of(row, name, tokenizer, room).ids for name in names))

    def loss(self, batch: Batch, share: float) -> Loss:
        left, right = self._rows(batch)
        with torch.autocast(left.device.type, enabled=False):
            scores = left @ right.t() / TEMPERATURE  # (R / 2, R / 2)
        truth = torch.arange(len(scores))
        loss = (F.cross_entropy(scores, truth) + F.cross_entropy(scores.t(), truth)) / 2
        return loss, {}

    def measure(self, batches: Iterator[Batch]) -> dict[str, float]:
        pairs = [self._rows(batch) for batch in batches]
        left, right = (torch.cat(column) for column in zip(*pairs, strict=True))
        return retrieval(left, right)

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        left, right = F.normalize(self.pooled(batch.ids), dim=-1).chunk(2)
        return left, right


class TokenLabels(Objective):
    """Tokens that lie in a labelled span score high in the critic head."""

    fields = ("text", "spans")
    heads = ("critic_head",)

    def example(self, row: Row, names: Sequence[str], tokenizer: Tokenizer) -> Example:
        tokens = tokens_of(row, names[0], tokenizer, self.gpt.config.block_size)
        spans = _spans(row, names[1])
        inside = [any(a < end and start < b for a, b in spans) for start, end in tokens.offsets]
        return Example((tokens.ids,), [int(hit) for hit in inside])

    def loss(self, batch: Batch, share: float) -> Loss:
        scores, labels = self._scored(batch)
        return F.binary_cross_entropy_with_logits(scores, labels), {}

    def measure(self, batches: Iterator[Batch]) -> dict[str, float]:
        pairs = [self._scored(batch) for batch in batches]
        scores, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        return {
            "average_precision": average_precision(labels, scores),
            "auc": area_under_roc(labels, scores),
        }

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Critic logits and labels of all tokens but padding, (N,) each."""
        scores = self.gpt.critic_scores(batch.ids)[batch.ids != self.pad_token_id]
        labels = torch.tensor([label for e in batch.examples for label in _labels(e)])
        return scores.float(), labels.float()


class Scores(Objective):
    """The sequence head gives a text its score from 0 to 1, from the [CLS] that is put before it.

    Scores that are not 0 or 1 are chances of 1: the loss is the cross-entropy to them.
    """

    fields = ("text", "score")
    heads = ("sequence_head", "cls_embedding")

    def __init__(self, gpt: GPT) -> None:
        super().__init__(gpt)
        if gpt.config.cls_token_id is None:
            raise ValueError("scores need a trunk with a cls_token_id: they are read off its state")
        self.cls_token_id = gpt.config.cls_token_id

    def example(self, row: Row, names: Sequence[str], tokenizer: Tokenizer) -> Example:
        ids = tokens_of(row, names[0], tokenizer, self.gpt.config.block_size - 1).ids
        score = row.fields[names[1]]
        if type(score) not in (int, float) or not 0 <= score <= 1:
            raise row.error(f"{names[1]!r} must be a number from 0 to 1")
        return Example(((self.cls_token_id, *ids),), float(score))

    def loss(self, batch: Batch, share: float) -> Loss:
        logits = self.gpt.sequence_head.logits(self.hidden(batch.ids)[:, 0])
        return F.binary_cross_entropy_with_logits(logits.float(), self._truth(batch)), {}

    def measure(self, batches: Iterator[Batch]) -> dict[str, float]:
        pairs = [
            (self._truth(b), self.gpt.sequence_head(self.hidden(b.ids)[:, 0])) for b in batches
        ]
        truth, found = (torch.cat(column).double() for column in zip(*pairs, strict=True))
        measures = {"mean_absolute_error": (truth - found).abs().mean().item()}
        if len(truth) > 1 and truth.std() > 0 and found.std() > 0:
            measures["correlation"] = torch.corrcoef(torch.stack((truth, found)))[0, 1].item()
        return measures

    def _truth(self, batch: Batch) -> Tensor:
        return torch.tensor([example.target for example in batch.examples])


def _labels(example: Example) -> Sequence[int]:
    assert isinstance(example.target, Sequence)
    return example.target


def _spans(row: Row, name: str) -> list[tuple[int, int]]:
    """A field of [start, end) character ranges. Raises DataError for anything else."""
    value = row.fields[name]
    proper = isinstance(value, list) and all(
        isinstance(span, list)
        and len(span) == 2
        and all(type(end) is int for end in span)
        and 0 <= span[0] < span[1]
        for span in value
    )
    if not proper:
        raise row.error(f"{name!r} must be a list of [start, end] character offsets")
    return [(start, end) for start, end in value]


def labels_of(rows: Sequence[Row], name: str) -> list[str]:
    """The labels of a classifier's training rows, sorted. Raises DataError for fewer than two."""
    labels = sorted({row.text(name) for row in rows})
    if len(labels) < 2:
        raise rows[0].error(f"{name!r} is {labels[0]!r} in every row: nothing to tell apart")
    return labels


OBJECTIVES: dict[str, type[Objective]] = {
    "masked": Masked,
    "classify": Classify,
    "pairs": Pairs,
    "tokens": TokenLabels,
    "score": Scores,
}
