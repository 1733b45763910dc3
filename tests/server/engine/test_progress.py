"""What counts as the progress of the batch on the device: its own forward, and no other."""

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, random_adapter
from torch import Tensor

from adapters.format import AdapterSet
from adapters.probe import Probe
from model import heads
from model.checkpoint import Backbone, read_backbone
from server.engine.admission import Row
from server.engine.batcher import Batch, form_batch
from server.engine.engine import Engine
from server.engine.forward import Forward
from server.engine.job import Ask, Job, Result
from server.metrics import Metrics

ASK = Ask(frozenset({"embedding"}))
ROW = Row(np.array([1, 2, 3]), None)


class Held(Forward):
    """Runs nothing before it may."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, torch.float32, torch.device("cpu"))
        self.is_held, self.may_run = threading.Event(), threading.Event()

    def run(self, batch: Batch) -> list[Result]:
        self.is_held.set()
        self.may_run.wait()
        return super().run(batch)


def masks() -> Job:
    ids, reply = np.full(3, TINY.mask_token_id), SimpleNamespace()
    ask = Ask(frozenset({"logits"}))
    return Job(ids, ask, None, 0.0, 0.0, reply, 0, lambda: None)  # type: ignore[arg-type]


def engine_of(forward: Forward) -> Engine:
    slots = SimpleNamespace(let_go=lambda slots: None, hold=None)
    library: Any = SimpleNamespace(slots=slots)
    return Engine(
        forward.backbone,
        library,
        forward,
        Metrics(),
        max_batch_tokens=64,
        max_queue_tokens=64,
        max_request_tokens=64,
        max_queue_s=60.0,
        fair_shares={},
    )


async def progress_around_a_probe(forward: Held, adapter: AdapterSet) -> tuple[Any, Any]:
    """The engine's, of a batch that does not get on, before and after a probe."""
    engine = engine_of(forward)
    engine.start()
    asked = asyncio.create_task(engine.encode([ROW], ASK, time.monotonic() + 60))
    await asyncio.to_thread(forward.is_held.wait)
    before = engine.loop.progress
    Probe(forward.encoder, forward.heads).delta(adapter)
    after = engine.loop.progress
    forward.may_run.set()
    await asked
    await engine.stop()
    return before, after


def test_a_batch_of_masks_gets_on_with_every_row(
    tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = read_backbone(tiny_backbone)
    forward, seen = Forward(backbone, torch.float32, torch.device("cpu")), []

    def likeliest_tokens(*arguments: Any) -> tuple[Tensor, Tensor]:
        seen.append(forward.progress.steps)
        return heads.likeliest_tokens(*arguments)

    monkeypatch.setattr("server.engine.forward.likeliest_tokens", likeliest_tokens)
    forward.run(form_batch([masks() for _ in range(4)], {}, forward.encoder.device))
    assert len(set(seen)) == 4


def test_an_upload_beside_a_stuck_batch_does_not_hide_that_it_is_stuck(
    tiny_backbone: Path,
) -> None:
    forward = Held(read_backbone(tiny_backbone))
    adapter = AdapterSet(random_adapter(TINY, 1), {"lora_alpha": "8.0"}, "")
    before, after = asyncio.run(progress_around_a_probe(forward, adapter))
    assert before is not None
    assert after == before
