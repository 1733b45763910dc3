"""One batch through the encoder and the heads: a Result a job."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import Backbone
from model.encoder import FINAL, Encoder, Progress
from model.heads import (
    TrunkHeads,
    critic_logits,
    label_scores,
    likeliest_tokens,
    pool,
    sequence_scores,
    wrongness,
)
from model.lora import Classifier, SequenceHead
from server.engine.batcher import Batch
from server.engine.errors import NonFiniteResult
from server.engine.job import Floats, Result

States = Mapping[int, Tensor]


class Forward:
    """The resident trunk with its own heads. Used by the device thread alone."""

    def __init__(
        self, backbone: Backbone, dtype: torch.dtype, device: torch.device, int8: bool = False
    ) -> None:
        self.backbone, self.config = backbone, backbone.config
        self.encoder = Encoder(self.config, backbone.tensors, dtype, device, int8=int8)
        self.progress = Progress()  # of the device thread alone: probes forward beside it
        self.heads = TrunkHeads.of(backbone.tensors, device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Result]:
        """Every output that a job asks for, from one forward; a row not finite errs alone."""
        wanted = {job.ask.layer for job in batch.jobs} | {FINAL}
        states = self.encoder.forward(batch.packed, batch.lora, wanted, self.progress)
        results = [Result(job.adapter) for job in batch.jobs]
        arrays = [
            *self._embeddings(batch, states, results),
            *self._hidden(batch, states, results),
            *self._critic(batch, states, results),
            *self._sequence_scores(batch, states, results),
            *self._mask_logits(batch, states, results),
            *self._labels(batch, states, results),
        ]
        if all(np.isfinite(array).all() for array in arrays):
            return results
        return [_finite_or_error(result) for result in results]

    # Each fills what it is asked for, of all the rows that it can take together, and yields the
    # arrays that the rows' outputs are parts of.

    def _embeddings(self, batch: Batch, states: States, results: list[Result]) -> Iterator[Floats]:
        kinds: dict[tuple[int, str], list[int]] = defaultdict(list)
        for row, job in enumerate(batch.jobs):
            if "embedding" in job.ask.outputs:
                kinds[job.ask.layer, job.ask.pooling].append(row)
        for (layer, pooling), rows in kinds.items():
            pooled = _floats(pool(states[layer], batch.packed, rows, pooling))
            for row, vector in zip(rows, pooled, strict=True):
                results[row].embedding = vector
            yield pooled

    def _hidden(self, batch: Batch, states: States, results: list[Result]) -> Iterator[Floats]:
        for row, job in enumerate(batch.jobs):
            if "tokens" in job.ask.outputs:
                hidden = _floats(states[job.ask.layer][_tokens(batch, row)])
                results[row].hidden = hidden
                yield hidden

    def _critic(self, batch: Batch, states: States, results: list[Result]) -> Iterator[Floats]:
        heads: dict[tuple[int, int], tuple[Tensor, Tensor | None, list[int]]] = {}
        for row, job in enumerate(batch.jobs):
            if "critic" not in job.ask.outputs:
                continue
            own = job.weights.critic if job.weights else None
            weight = own if own is not None else self.heads.critic
            if weight is None:
                continue  # a row led by [CLS], which asks for its sequence score alone
            own = job.weights.calibration if job.weights else None
            table = own if own is not None else self.backbone.calibration
            heads.setdefault((id(weight), id(table)), (weight, table, []))[2].append(row)
        for weight, table, rows in heads.values():
            logits = critic_logits(_tokens_of(states[FINAL], batch, rows), weight).cpu()
            ends = np.cumsum([batch.packed.lengths[row] for row in rows])[:-1]
            wrong = np.split(wrongness(logits, table).numpy(), ends)
            for row, its_logits, its_wrong in zip(
                rows, np.split(logits.numpy(), ends), wrong, strict=True
            ):
                results[row].critic_logits, results[row].wrongness = its_logits, its_wrong
            yield logits.numpy()

    def _sequence_scores(
        self, batch: Batch, states: States, results: list[Result]
    ) -> Iterator[Floats]:
        heads: dict[int, tuple[SequenceHead, list[int]]] = {}
        for row, job in enumerate(batch.jobs):
            if "critic" not in job.ask.outputs or job.ids[0] != self.config.cls_token_id:
                continue
            own = job.weights.sequence_head if job.weights else None
            head = own or self.heads.sequence
            if head is not None:
                heads.setdefault(id(head), (head, []))[1].append(row)
        for head, rows in heads.values():
            first = states[FINAL][[batch.packed.starts[row] for row in rows]]
            scores = _floats(sequence_scores(first, head))
            for row, score in zip(rows, scores.tolist(), strict=True):
                results[row].sequence_score = score
            yield scores

    def _mask_logits(self, batch: Batch, states: States, results: list[Result]) -> Iterator[Floats]:
        for row, job in enumerate(batch.jobs):
            if "logits" not in job.ask.outputs:
                continue
            masks = np.flatnonzero(job.ids == self.config.mask_token_id)
            at = torch.from_numpy(masks).to(states[FINAL].device)
            hidden = states[FINAL][_tokens(batch, row)][at]
            ids, logprobs = likeliest_tokens(hidden, self.encoder.wte, job.ask.top_k)
            results[row].masks = masks.tolist()
            results[row].top_ids = ids.cpu().numpy()
            results[row].top_logprobs = top = _floats(logprobs)
            self.progress.step()  # a batch of masks takes seconds where V is large
            yield top

    def _labels(self, batch: Batch, states: States, results: list[Result]) -> Iterator[Floats]:
        heads: dict[int, tuple[Classifier, list[int]]] = {}
        for row, job in enumerate(batch.jobs):
            if "labels" not in job.ask.outputs:
                continue
            classifier = job.weights.classifier if job.weights else None
            assert classifier is not None, "admission lets no job without a classifier ask for it"
            heads.setdefault(id(classifier), (classifier, []))[1].append(row)
        for classifier, rows in heads.values():
            pooled = pool(states[FINAL], batch.packed, rows, self.config.pooling)
            scores = _floats(label_scores(pooled, classifier))
            for row, its_scores in zip(rows, scores, strict=True):
                results[row].labels, results[row].label_scores = classifier.labels, its_scores
            yield scores


def _tokens_of(states: Tensor, batch: Batch, rows: Sequence[int]) -> Tensor:
    """The states of these rows' tokens, end to end."""
    if len(rows) == len(batch.jobs):
        return states
    return torch.cat([states[_tokens(batch, row)] for row in rows])


def _tokens(batch: Batch, row: int) -> slice:
    start = batch.packed.starts[row]
    return slice(start, start + batch.packed.lengths[row])


def _floats(tensor: Tensor) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array


def _finite_or_error(result: Result) -> Result:
    arrays = (
        result.embedding,
        result.hidden,
        result.critic_logits,
        result.top_logprobs,
        result.label_scores,
        result.sequence_score,
    )
    if all(array is None or np.isfinite(array).all() for array in arrays):
        return result
    sentence = "the result has values that are not finite; nothing of this row is sent"
    return Result(result.adapter, error=NonFiniteResult(sentence))
