"""`trunkline serve` whose forward obeys the token ids, which the names below tell."""

import threading
import time
from typing import Any

import torch

from server.cli import main
from server.engine.batcher import Batch
from server.engine.forward import Forward

POISON, HANG, KILL, HUNGRY, SLOW, PAUSE, BREAK = 7, 8, 9, 10, 11, 12, 13
run = Forward.run


def faulty(self: Forward, batch: Batch) -> Any:
    ids = set(batch.packed.ids.tolist())
    if POISON in ids:
        raise RuntimeError("poison")
    if HANG in ids:
        threading.Event().wait()
    if KILL in ids:
        raise SystemExit
    if PAUSE in ids:  # stuck for 3 s, then it goes on
        time.sleep(3)
    if BREAK in ids:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if HUNGRY in ids and len(batch.jobs) > 1:
        raise MemoryError
    if SLOW in ids:  # a batch of 4 s that gets on all the time
        for _ in range(16):
            run(self, batch)
            time.sleep(0.25)
    return run(self, batch)


Forward.run = faulty  # type: ignore[method-assign]
if __name__ == "__main__":
    main()
