"""The random trunk that is measured, its adapter sets, and the rows that are put through it."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.format import FORMAT, AdapterSet, adapter_bytes, parse_adapter
from adapters.slots import SlotPool
from adapters.weights import placed_bytes
from loadtest.bench.plan import LONGEST
from loadtest.workload import Lengths
from model.checkpoint import Backbone, backbone_digest, backbone_tensors
from model.config import LORA_SITES, GPTConfig
from model.encoder import FINAL, Encoder
from model.gpt import GPT
from model.heads import pool
from model.lora import AdapterWeights, LoraBatch, Segment
from model.packed import PackedBatch
from model.tokenizer import Tokenizer

LOAD_S = 60.0
SHORTEST = 4
MIXED = Lengths(median=48, sigma=0.8, low=SHORTEST, high=LONGEST)
B_STD = 0.02  # with A as LoRA begins it, a site's change is about a sixth of what it is added to


def adapter_tensors(config: GPTConfig, rank: int, seed: int) -> dict[str, Tensor]:
    """LoRA of every site, of the size that training leaves: A as it begins, B not zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(config.n_layer):
        for site, (into, out) in LORA_SITES.items():
            path, width = f"transformer.h.{layer}.{site}", config.n_embd
            a = torch.rand(rank, into * width, generator=generator) * 2 - 1
            tensors[f"{path}.A.weight"] = a * (into * width) ** -0.5
            b = torch.randn(out * width, rank, generator=generator)
            tensors[f"{path}.B.weight"] = b * B_STD
    return tensors


def adapter_file(config: GPTConfig, digest: str, rank: int, seed: int, **metadata: str) -> bytes:
    fields = {"format": FORMAT, "lora_alpha": repr(2.0 * rank), "base_digest": digest}
    return adapter_bytes(adapter_tensors(config, rank, seed), fields | metadata)


def mixed_lengths(total: int, seed: int = 0) -> list[int]:
    """Log-normal lengths of `total` tokens together."""
    rng = random.Random(seed)
    lengths: list[int] = []
    while total > 0:
        length = min(MIXED.draw(rng), total)
        if 0 < total - length < SHORTEST:  # no row is shorter
            length = total if total <= LONGEST else total // 2
        lengths.append(length)
        total -= length
    return lengths


@dataclass(frozen=True, eq=False)
class Adapter:
    set: AdapterSet
    weights: AdapterWeights  # resident in the slots


@dataclass(frozen=True)
class Rows:
    """Rows in the order in which the engine packs them: one adapter's together, then by length."""

    ids: list[Tensor]  # (T,) each
    adapters: list[Adapter | None]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Trunk:
    """A backbone of a shape with random weights, its float32 oracle and its serving encoder."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.config, self.dtype = config, dtype
        self.gpt = GPT(config).eval()
        tensors = backbone_tensors(config, self.gpt.state_dict())
        tokenizer = Tokenizer.of_characters({chr(97 + i): i for i in range(26)})
        digest = backbone_digest(config, tensors)
        self.backbone = Backbone("bench", config, tensors, tokenizer, None, digest)
        self.encoder = Encoder(config, tensors, dtype)
        self._adapters: dict[tuple[int, int], Adapter] = {}
        # As the server's engine has one: what runs on the main thread wakes torch's own workers,
        # and they spin on the cores for a while.
        self.device_thread = ThreadPoolExecutor(1, "device")

    def adapters(self, count: int, rank: int) -> list[Adapter]:
        """The first `count` adapters of a rank, resident in slots as they are when served."""
        self._load([seed for seed in range(count) if (rank, seed) not in self._adapters], rank)
        return [self._adapters[rank, seed] for seed in range(count)]

    def _load(self, seeds: Sequence[int], rank: int) -> None:
        sets = [self.adapter_set(rank, seed) for seed in seeds]
        read = {adapter.digest: adapter for adapter in sets}
        capacity = sum(placed_bytes(adapter, self.dtype) for adapter in sets)
        slots = SlotPool(
            self.config,
            self.dtype,
            self.encoder.device,
            capacity_bytes=capacity,
            max_slots=0,
            read=read.__getitem__,
        )
        for seed, adapter in zip(seeds, sets, strict=True):
            assert slots.load_now(adapter.digest, LOAD_S), "an adapter did not load"
            slot = slots.hold(adapter.digest)
            assert slot is not None, "a slot was evicted"
            self._adapters[rank, seed] = Adapter(adapter, slot.weights)
        slots.close()

    def adapter_set(self, rank: int, seed: int) -> AdapterSet:
        return parse_adapter(bytearray(adapter_file(self.config, self.digest, rank, seed)))

    @property
    def digest(self) -> str:
        return self.backbone.digest

    def rows(self, lengths: Sequence[int], adapters: Sequence[Adapter | None] = (None,)) -> Rows:
        """Random ids of these lengths; the adapters are dealt to the rows in turn."""
        generator = torch.Generator().manual_seed(len(lengths))
        made = [
            (
                index % len(adapters),
                torch.randint(self.config.vocab_size, (n,), generator=generator),
            )
            for index, n in enumerate(lengths)
        ]
        made.sort(key=lambda row: (row[0], len(row[1])))
        return Rows([ids for _, ids in made], [adapters[index] for index, _ in made])

    def run(self, rows: Rows) -> Tensor:
        """The states after ln_f, (N, C): planning the batch and the forward, as for each batch."""
        return self.device_thread.submit(self._states, rows).result()[1]

    def run_rows(self, rows: Rows) -> list[Tensor]:
        """The same as one tensor a row, (T, C)."""
        return list(torch.split(self.run(rows), rows.lengths))

    def run_without_lora(self, rows: Rows) -> Tensor:
        """The same with no row's adapter looked at."""
        whole = [Segment(0, sum(rows.lengths), None)]
        return self.device_thread.submit(self._states, rows, LoraBatch(whole)).result()[1]

    @torch.inference_mode()
    def embed(self, rows: Rows) -> Tensor:
        """The pooled rows, (B, C) float32; to be called on the device thread."""
        packed, states = self._states(rows)
        return pool(states, packed, range(len(rows.ids)), "mean")

    @torch.inference_mode()
    def _states(self, rows: Rows, lora: LoraBatch | None = None) -> tuple[PackedBatch, Tensor]:
        packed = PackedBatch(torch.cat(rows.ids), rows.lengths)
        if lora is None:
            weights = [adapter.weights if adapter else None for adapter in rows.adapters]
            lora = LoraBatch.of_rows(packed.lengths, weights)
        return packed, self.encoder.forward(packed, lora)[FINAL]
