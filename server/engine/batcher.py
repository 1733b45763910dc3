"""form_batch: jobs in, one packed batch out. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapters.slots import Slot
from model.lora import LoraBatch
from model.packed import PackedBatch
from server.engine.job import Job


@dataclass(frozen=True)
class Batch:
    jobs: list[Job]  # in the order of their rows
    packed: PackedBatch
    lora: LoraBatch


def form_batch(jobs: Sequence[Job], slots: Mapping[str, Slot], device: torch.device) -> Batch:
    """Rows of one adapter stand together, equal lengths beside each other within it.

    `slots` has the held slot of every adapter among the jobs, by digest.
    """
    for job in jobs:
        job.weights = slots[job.adapter.digest].weights if job.adapter else None
    ordered = sorted(jobs, key=lambda job: (_adapter_key(job), job.tokens))
    ids = torch.from_numpy(np.concatenate([job.ids for job in ordered])).to(device)
    packed = PackedBatch(ids, [job.tokens for job in ordered])
    lora = LoraBatch.of_rows(packed.lengths, [job.weights for job in ordered])
    return Batch(ordered, packed, lora)


def _adapter_key(job: Job) -> str:
    return job.adapter.digest if job.adapter else ""
