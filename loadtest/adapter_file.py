"""Random adapter files for whatever trunk the server has: every site, critic and classifier."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# (in, out) of each LoRA site in multiples of n_embd, as the adapter file format has them
SITES = {
    "attn.lora_qkv": (1, 3),
    "attn.lora_out": (1, 1),
    "mlp.lora_fc": (1, 4),
    "mlp.lora_proj": (4, 1),
}
LABELS = ("tragedy", "comedy", "history")
ALPHA = 16.0
STRENGTH = 0.1  # of A and B: the adapters' answers are far apart, and stay finite


@dataclass(frozen=True)
class AdapterMaker:
    """config: GET /info's; digest: its backbone's."""

    config: Mapping[str, Any]
    digest: str
    rank: int

    def file(self, seed: int) -> bytes:
        """A safetensors file of float16; the same seed gives the same bytes."""
        shapes = self._shapes()
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        noise = np.random.default_rng(seed).standard_normal(sum(sizes.values()), np.float32)
        data = (noise * STRENGTH).astype("<f2").tobytes()
        header: dict[str, Any] = {"__metadata__": self._metadata()}
        at = 0
        for name, shape in shapes.items():
            end = at + 2 * sizes[name]
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        return len(text).to_bytes(8, "little") + text + data

    def _shapes(self) -> dict[str, list[int]]:
        width = self.config["n_embd"]
        shapes: dict[str, list[int]] = {}
        for layer in range(self.config["n_layer"]):
            for site, (into, out) in SITES.items():
                path = f"transformer.h.{layer}.{site}"
                shapes[f"{path}.A.weight"] = [self.rank, into * width]
                shapes[f"{path}.B.weight"] = [out * width, self.rank]
        shapes["critic_head.weight"] = [1, width]
        shapes["classifier.weight"] = [len(LABELS), width]
        shapes["classifier.bias"] = [len(LABELS)]
        return shapes

    def _metadata(self) -> dict[str, str]:
        return {
            "format": "trunkline-adapter/1",
            "lora_alpha": str(ALPHA),
            "base_digest": self.digest,
            "labels": json.dumps(LABELS),
        }
