"""One batch through the encoder and the heads: a Result a job."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import Backbone
from model.encoder import FINAL, Encoder, Progress
from model.heads import (
    critic_logits,
    label_scores,
    likeliest_tokens,
    pool,
    sequence_scores,
    wrongness,
)
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
        heads = {
            name: tensor.to(device, torch.float32)
            for name, tensor in backbone.tensors.items()
            if "_head." in name
        }
        self.critic = heads["critic_head.weight"][0] if "critic_head.weight" in heads else None
        self.sequence_head = [
            heads[f"sequence_head.{part}"]
            for part in ("base_predictor.weight", "A", "B")
            if f"sequence_head.{part}" in heads
        ]

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Result]:
        """Every output that a job asks for, from one forward; a row not finite errs alone."""
        wanted = {job.ask.layer for job in batch.jobs} | {FINAL}
        states = self.encoder.forward(batch.packed, batch.lora, wanted, self.progress)
        results = [Result(job.adapter) for job in batch.jobs]
        self._embeddings(batch, states, results)
        self._hidden(batch, states, results)
        self._critic(batch, states, results)
        self._mask_logits(batch, states, results)
        self._labels(batch, states, results)
        return [_finite_or_error(result) for result in results]

    def _embeddings(self, batch: Batch, states: States, results: list[Result]) -> None:
        kinds: dict[tuple[int, str], list[int]] = defaultdict(list)
        for row, job in enumerate(batch.jobs):
            if "embedding" in job.ask.outputs:
                kinds[job.ask.layer, job.ask.pooling].append(row)
        for (layer, pooling), rows in kinds.items():
            pooled = _floats(pool(states[layer], batch.packed, rows, pooling))
            for row, vector in zip(rows, pooled, strict=True):
                results[row].embedding = vector

    def _hidden(self, batch: Batch, states: States, results: list[Result]) -> None:
        for row, job in enumerate(batch.jobs):
            if "tokens" in job.ask.outputs:
                results[row].hidden = _floats(states[job.ask.layer][_tokens(batch, row)])

    def _critic(self, batch: Batch, states: States, results: list[Result]) -> None:
        for row, job in enumerate(batch.jobs):
            if "critic" not in job.ask.outputs:
                continue
            own = job.weights.critic if job.weights else None
            table = job.weights.calibration if job.weights else None
            weight = own if own is not None else self.critic
            assert weight is not None, "admission lets no job without a critic ask for it"
            logits = critic_logits(states[FINAL][_tokens(batch, row)], weight).cpu()
            results[row].critic_logits = logits.numpy()
            table = table if table is not None else self.backbone.calibration
            results[row].wrongness = wrongness(logits, table).numpy()
            if self.sequence_head and job.ids[0] == self.config.cls_token_id:
                first = states[FINAL][batch.packed.starts[row]].unsqueeze(0)
                results[row].sequence_score = float(sequence_scores(first, *self.sequence_head)[0])

    def _mask_logits(self, batch: Batch, states: States, results: list[Result]) -> None:
        for row, job in enumerate(batch.jobs):
            if "logits" not in job.ask.outputs:
                continue
            masks = np.flatnonzero(job.ids == self.config.mask_token_id)
            at = torch.from_numpy(masks).to(states[FINAL].device)
            hidden = states[FINAL][_tokens(batch, row)][at]
            ids, logprobs = likeliest_tokens(hidden, self.encoder.wte, job.ask.top_k)
            results[row].masks = masks.tolist()
            results[row].top_ids = ids.cpu().numpy()
            self.progress.steps += 1  # a batch of masks takes seconds where V is large
            results[row].top_logprobs = _floats(logprobs)

    def _labels(self, batch: Batch, states: States, results: list[Result]) -> None:
        for row, job in enumerate(batch.jobs):
            if "labels" not in job.ask.outputs:
                continue
            classifier = job.weights.classifier if job.weights else None
            assert classifier is not None, "admission lets no job without a classifier ask for it"
            pooled = pool(states[FINAL], batch.packed, [row], self.config.pooling)
            results[row].labels = classifier.labels
            results[row].label_scores = _floats(label_scores(pooled, classifier)[0])


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
    )
    if all(array is None or np.isfinite(array).all() for array in arrays):
        return result
    sentence = "the result has values that are not finite; nothing of this row is sent"
    return Result(result.adapter, error=NonFiniteResult(sentence))
