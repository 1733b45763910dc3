"""10,000 registered adapters beside 10: time to open, to resolve and to list, and bytes resident.

The same calls on both libraries, in turn, in one run; what counts is the ratio of the medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from adapters.format import AdapterSet, adapter_bytes
from adapters.library import Library, Upload
from adapters.slots import SlotPool
from adapters.weights import placed_bytes
from model.checkpoint import Backbone, backbone_digest, backbone_tensors
from model.config import LORA_SITES, GPTConfig
from model.encoder import Encoder
from model.gpt import GPT
from model.tokenizer import Tokenizer

CONFIG = GPTConfig(block_size=64, vocab_size=16, n_layer=2, n_head=2, n_embd=16)
SMALL = GPTConfig(vocab_size=16, n_layer=6, n_head=6, n_embd=384)  # BENCH.md's standard shape
CPU = torch.device("cpu")


def random_tensors(config: GPTConfig, rank: int) -> dict[str, torch.Tensor]:
    """LoRA of every site, B not zero."""
    tensors = {}
    for layer in range(config.n_layer):
        for site, (into, out) in LORA_SITES.items():
            path = f"transformer.h.{layer}.{site}"
            tensors[f"{path}.A.weight"] = torch.randn(rank, into * config.n_embd)
            tensors[f"{path}.B.weight"] = torch.randn(out * config.n_embd, rank)
    return tensors


def make_backbone() -> Backbone:
    torch.manual_seed(0)
    tensors = backbone_tensors(CONFIG, GPT(CONFIG).state_dict())
    tokenizer = Tokenizer.of_characters({chr(97 + i): i for i in range(16)})
    return Backbone("bench", CONFIG, tensors, tokenizer, None, backbone_digest(CONFIG, tensors))


def open_library(folder: Path, backbone: Backbone) -> Library:
    return Library(
        folder,
        backbone,
        Encoder(CONFIG, backbone.tensors),
        lambda read: SlotPool(
            CONFIG, torch.float32, CPU, capacity_bytes=1 << 24, max_slots=0, read=read
        ),
    )


def fill(library: Library, count: int) -> None:
    for number in range(count):
        incoming = library.store.incoming()
        incoming.write(adapter_bytes(random_tensors(CONFIG, 1), {"lora_alpha": "8.0"}))
        library.publish(Upload(f"tenant-{number % 97}/adapter-{number:05}", "bench"), incoming)
        incoming.discard()


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def resolve_some(library: Library, count: int) -> None:
    for number in range(0, count, max(1, count // 10)):
        library.registry.resolve(f"tenant-{number % 97}/adapter-{number:05}")


def measure(folders: dict[int, Path], backbone: Backbone, runs: int) -> dict[str, dict[int, float]]:
    """Median seconds of each action for each count."""
    times: dict[str, dict[int, list[float]]] = {}

    def note(action: str, count: int, value: float) -> None:
        times.setdefault(action, {}).setdefault(count, []).append(value)

    for _ in range(runs):
        for count, folder in folders.items():
            began = time.perf_counter()
            library = open_library(folder, backbone)
            note("start", count, time.perf_counter() - began)
            resolve_some(library, count)  # connections and statements warm, as in a server
            note("resolve", count, seconds(lambda: resolve_some(library, count)) / 10)  # noqa: B023
            note("list", count, seconds(lambda: library.registry.page(limit=100)))  # noqa: B023
            middle = f"tenant-50/adapter-{count // 2:05}"
            note("list_middle", count, seconds(lambda: library.registry.page(middle, 100)))  # noqa: B023
            library.close()
    return {
        action: {count: statistics.median(values) for count, values in by_count.items()}
        for action, by_count in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = make_backbone()
    with tempfile.TemporaryDirectory() as root:
        folders = {10: Path(root) / "few", options.count: Path(root) / "many"}
        for count, folder in folders.items():
            library = open_library(folder, backbone)
            fill(library, count)
            library.close()
        medians = measure(folders, backbone, options.runs)
    for action, by_count in medians.items():
        few, many = by_count[10] * 1e3, by_count[options.count] * 1e3
        print(
            f"{action:12} 10: {few:8.3f} ms   {options.count}: {many:8.3f} ms   x{many / few:.2f}"
        )
    adapter = AdapterSet(random_tensors(SMALL, 8), {}, "")
    numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    bytes_over_tensors = placed_bytes(adapter, torch.bfloat16) / (2 * numbers)
    ratios = {f"{a}_{options.count}_over_10": c[options.count] / c[10] for a, c in medians.items()}
    print(json.dumps(ratios | {"resident_bytes_over_tensors": bytes_over_tensors}))


if __name__ == "__main__":
    main()
