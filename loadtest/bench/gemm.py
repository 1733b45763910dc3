"""The machine's own matrix rate at a trunk's four matrices: what no forward can beat.

x (M, in) times W (in, out), no bias, each matrix again and again, so that it is in the cache. For
each matrix the fastest way counts: the weights as nn.Linear has them, transposed, or packed
beforehand by oneDNN; M the whole of the tokens or a part of them. `Together`: all threads share
each product. `Apart`: each thread multiplies tokens of its own and waits for nobody until the end.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from loadtest.bench.pairs import seconds
from model.config import MAIN_MATRICES, GPTConfig

PARTS = (1, 2, 4, 8)  # of the tokens
TRIES = 9

Multiply = Callable[[], object]


@dataclass(frozen=True)
class Gemm:
    """One matrix on all of the tokens, a part at a time."""

    matrix: str
    part: int  # tokens
    way: str
    run: Callable[[], None]


def linear_flops(config: GPTConfig, tokens: int) -> float:
    weights = sum(out * into for out, into in MAIN_MATRICES.values()) * config.n_embd**2
    return 2.0 * weights * config.n_layer * tokens


def attention_flops(config: GPTConfig, lengths: list[int]) -> float:
    return 4.0 * config.n_embd * config.n_layer * sum(length**2 for length in lengths)


def best_gemms(config: GPTConfig, dtype: torch.dtype, tokens: int) -> list[Gemm]:
    """For each of the four matrices the way that takes least time on this thread's threads."""
    chosen = []
    for matrix, (out, into) in MAIN_MATRICES.items():
        candidates = [
            _gemm(matrix, part, tokens // part, way, multiply)
            for part in (tokens // parts for parts in PARTS if tokens % parts == 0)
            for way, multiply in _ways(into * config.n_embd, out * config.n_embd, part, dtype)
        ]
        for gemm in candidates:
            gemm.run()
        chosen.append(min(candidates, key=lambda g: min(seconds(g.run) for _ in range(TRIES))))
    return chosen


def _gemm(matrix: str, part: int, parts: int, way: str, multiply: Multiply) -> Gemm:
    def run() -> None:
        for _ in range(parts):
            multiply()

    return Gemm(matrix, part, way, run)


def _ways(into: int, out: int, part: int, dtype: torch.dtype) -> list[tuple[str, Multiply]]:
    weight, x = torch.randn(out, into).to(dtype), torch.randn(part, into).to(dtype)
    plain, transposed = weight.t(), weight.t().contiguous()
    y = torch.empty(part, out, dtype=dtype)
    ways: list[tuple[str, Multiply]] = [
        ("plain", lambda: torch.mm(x, plain, out=y)),
        ("transposed", lambda: torch.mm(x, transposed, out=y)),
    ]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, part)
        linear = torch.ops.mkldnn._linear_pointwise
        linear(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):  # a torch without oneDNN, or a dtype it does not pack
        return ways
    return [*ways, ("packed", lambda: linear(x, packed, None, "none", [], ""))]


class Together:
    """A forward's matrix products, all threads at each of them."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype, tokens: int) -> None:
        self.layers = config.n_layer
        self.gemms = best_gemms(config, dtype, tokens)

    @torch.inference_mode()
    def run(self) -> None:
        for gemm in self.gemms:
            for _ in range(self.layers):
                gemm.run()


class Apart:
    """The same products, each thread on its share of the tokens."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype, tokens: int) -> None:
        threads = torch.get_num_threads()
        self._workers = ThreadPoolExecutor(
            threads, "gemm", initializer=torch.set_num_threads, initargs=(1,)
        )
        share = tokens // threads
        made = [self._workers.submit(Together, config, dtype, share) for _ in range(threads)]
        self.shares = [future.result() for future in made]

    @property
    def gemms(self) -> list[Gemm]:
        return self.shares[0].gemms

    def run(self) -> None:
        for future in [self._workers.submit(share.run) for share in self.shares]:
            future.result()
