"""`trunkline serve` whose forward obeys the token ids: 7 poisons its batch, 8 hangs, 9 kills."""

import threading
from typing import Any

from server.cli import main
from server.engine.batcher import Batch
from server.engine.forward import Forward

POISON, HANG, KILL, HUNGRY = 7, 8, 9, 10
run = Forward.run


def faulty(self: Forward, batch: Batch) -> Any:
    ids = set(batch.packed.ids.tolist())
    if POISON in ids:
        raise RuntimeError("poison")
    if HANG in ids:
        threading.Event().wait()
    if KILL in ids:
        raise SystemExit
    if HUNGRY in ids and len(batch.jobs) > 1:
        raise MemoryError
    return run(self, batch)


Forward.run = faulty  # type: ignore[method-assign]
main()
