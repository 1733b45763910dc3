"""What is measured, how large and how often."""

from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import GPTConfig

VOCABULARY = 8192
LONGEST = 512  # tokens of a row


@dataclass(frozen=True)
class Shape:
    """A trunk and the ranks of its adapters, the usual one first."""

    n_embd: int
    n_layer: int
    n_head: int
    ranks: tuple[int, ...]

    def config(self, block_size: int = LONGEST) -> GPTConfig:
        return GPTConfig(
            block_size=block_size,
            vocab_size=VOCABULARY,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            share_main_matrices=True,
        )


SHAPES = {
    "small": Shape(384, 6, 6, (8, 32)),
    "big": Shape(512, 12, 8, (32,)),
    "large": Shape(768, 12, 12, (16,)),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are those of a full run."""

    rounds: int = 7  # pairs of every ratio
    slow_rounds: int = 7  # of those through a server, and of the peers
    starts: int = 7  # of those that need a server of its own on each side
    round_s: float = 0.4  # of both sides together, in process
    window_s: float = 2.0  # of a load through HTTP or the engine
    swap_window_s: float = 5.0
    batch_tokens: int = 4096
    peer_tokens: int = 4096  # of the batches that the peers get, too
    uniform: int = 128  # tokens of a row
    adapters: tuple[int, ...] = (1, 8, 32)  # distinct in a batch
    checked_rows: int = 32  # compared with the oracle before a timing
    lone_requests: int = 60  # a round
    puts: int = 20  # timed from PUT to first answer
    swaps_per_s: float = 10.0
    registered: tuple[int, ...] = (1, 10, 100, 1000, 10_000)
    zipf: int = 1000  # adapters
    further: bool = True  # what is measured beside the ratios that every run has
    slots: int = 64


QUICK = Sizes(
    rounds=3,
    slow_rounds=2,
    starts=1,
    round_s=0.15,
    window_s=0.4,
    swap_window_s=0.7,
    peer_tokens=2048,
    checked_rows=6,
    lone_requests=30,
    puts=5,
    registered=(10, 10_000),
    further=False,
)


@dataclass(frozen=True)
class Plan:
    shape_name: str
    shape: Shape
    dtype_name: str  # as `trunkline serve --dtype` takes it
    dtype: torch.dtype
    threads: int
    sizes: Sizes
    scratch: Path  # an empty folder
    minilm: Path | None = None  # a sentence-transformers model
