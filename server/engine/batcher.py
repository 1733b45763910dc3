"""form_batch: jobs in, one packed batch out. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.lora import LoraBatch
from model.packed import PackedBatch
from server.engine.job import Job


@dataclass(frozen=True)
class Batch:
    jobs: list[Job]  # in the order of their rows
    packed: PackedBatch
    lora: LoraBatch


def form_batch(jobs: Sequence[Job], device: torch.device) -> Batch:
    """Rows of one adapter stand together, equal lengths beside each other within it."""
    ordered = sorted(jobs, key=lambda job: (id(job.weights) if job.weights else 0, job.tokens))
    ids = torch.from_numpy(np.concatenate([job.ids for job in ordered])).to(device)
    packed = PackedBatch(ids, [job.tokens for job in ordered])
    lora = LoraBatch.of_rows(packed.lengths, [job.weights for job in ordered])
    return Batch(ordered, packed, lora)
