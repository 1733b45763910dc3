"""An adapter set against the backbone it is for: names, shapes, ranks, values, metadata."""

import difflib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.errors import Invalid
from adapters.format import FORMAT, AdapterSet
from model.checkpoint import norm_shapes
from model.config import LORA_SITES, GPTConfig
from model.heads import CALIBRATION_BUCKETS, SEQUENCE_HEAD

MAX_RANK = 64
MAX_LABELS = 10_000
MAX_METADATA = 64 << 10  # characters of all names and values together; labels do not count
SHOWN_DIGEST = len("sha256:") + 12  # characters, in a sentence
MAX_NAME = 200  # characters of an unknown tensor's name that are compared with the known ones

_CLASSIFIER_NAMES = ("classifier.weight", "classifier.bias")
_LORA_NAME = re.compile(
    r"transformer\.h\.(0|[1-9][0-9]{0,5})\.(attn\.lora_qkv|attn\.lora_out|mlp\.lora_fc|mlp\.lora_proj)"
    r"\.([AB])\.weight"
)


@dataclass(frozen=True)
class Manifest:
    """What an adapter set changes."""

    ranks: dict[int, dict[str, int]] = field(default_factory=dict)  # layer -> site -> rank
    norms: list[str] = field(default_factory=list)
    critic: bool = False
    calibration: bool = False
    labels: tuple[str, ...] = ()
    sequence_head: bool = False
    cls_embedding: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"labels": list(self.labels)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Manifest":
        """The inverse of to_dict, also after a way through JSON, which makes keys strings.

        A registry keeps the manifests of other versions of this program: a field that they lack
        has its default, and one that this version does not know is left out.
        """
        ranks = {int(layer): sites for layer, sites in stored["ranks"].items()}
        known = {each.name: stored[each.name] for each in fields(cls) if each.name in stored}
        return cls(**known | {"ranks": ranks, "labels": tuple(stored["labels"])})

    @cached_property
    def _longest_labels(self) -> NDArray[np.int64]:
        """The bytes of the n longest labels together, at n - 1, as JSON within JSON."""
        escaped = [len(orjson.dumps(orjson.dumps(label).decode())) for label in self.labels]
        return np.cumsum(np.sort(np.array(escaped))[::-1])

    def longest_labels(self, count: int) -> int:
        """The most bytes that `count` of the labels have in JSON, be it text of other JSON."""
        return int(self._longest_labels[count - 1])

    @property
    def rank(self) -> int:
        """The largest rank of any site, 0 without LoRA."""
        return max((rank for sites in self.ranks.values() for rank in sites.values()), default=0)


def validate(
    adapter: AdapterSet,
    config: GPTConfig,
    base_digest: str,
    serving_dtype: torch.dtype,
    max_rank: int = MAX_RANK,
) -> Manifest:
    """What the adapter changes. Raises Invalid unless the backbone can apply every tensor of it."""
    _check_metadata(adapter.metadata, base_digest)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    ranks = _check_lora(shapes, config, max_rank)
    labels = _check_classifier(shapes, adapter, config)
    _check_others(shapes, config)
    _check_sequence_head(shapes)
    for name, tensor in adapter.tensors.items():
        _check_values(name, tensor, serving_dtype)
    _check_scaled(adapter, serving_dtype)
    norms = sorted({name.rpartition(".")[0] for name in shapes if ".ln_" in name})
    _check_norm_pairs(norms, shapes, config)
    return Manifest(
        ranks,
        norms,
        critic="critic_head.weight" in shapes,
        calibration="calibration" in shapes,
        labels=labels,
        sequence_head=SEQUENCE_HEAD[0] in shapes,
        cls_embedding="cls_embedding" in shapes,
    )


def _check_metadata(metadata: Mapping[str, str], base_digest: str) -> None:
    if metadata.get("format", FORMAT) != FORMAT:
        raise Invalid("bad_metadata", f"metadata format must be {FORMAT}")
    size = sum(len(key) + len(value) for key, value in metadata.items() if key != "labels")
    if size > MAX_METADATA:
        raise Invalid(
            "metadata_too_large",
            f"the metadata has {size} characters beside the labels; {MAX_METADATA} are taken",
        )
    try:
        alpha = float(metadata.get("lora_alpha", ""))
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        raise Invalid("lora_alpha", "metadata lora_alpha must be there, a finite number above 0")
    if metadata.get("use_rslora", "false") not in ("true", "false"):
        raise Invalid("bad_metadata", "metadata use_rslora must be true or false")
    trained_on = metadata.get("base_digest", base_digest)
    if trained_on != base_digest:
        theirs, ours = ascii(trained_on[:SHOWN_DIGEST]), ascii(base_digest[:SHOWN_DIGEST])
        raise Invalid(
            "base_digest",
            f"the adapter was trained on another backbone, {theirs}; this one is {ours}: serve the "
            "adapter's own, or train it on this one",
        )


def _check_lora(
    shapes: Mapping[str, tuple[int, ...]], config: GPTConfig, max_rank: int
) -> dict[int, dict[str, int]]:
    pairs: dict[tuple[int, str], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        match = _LORA_NAME.fullmatch(name)
        if match is None:
            continue
        layer = int(match[1])
        if layer >= config.n_layer:
            raise Invalid("layer_out_of_range", f"{name}: the backbone has {config.n_layer} layers")
        pairs[layer, match[2]][match[3]] = shape
    ranks: dict[int, dict[str, int]] = defaultdict(dict)
    for (layer, site), pair in sorted(pairs.items()):
        ranks[layer][site] = _check_pair(
            f"transformer.h.{layer}.{site}", site, pair, config, max_rank
        )
    return dict(ranks)


def _check_pair(
    path: str, site: str, pair: Mapping[str, tuple[int, ...]], config: GPTConfig, max_rank: int
) -> int:
    if len(pair) < 2:
        raise Invalid("missing_pair", f"{path} has only one of A and B")
    width_in, width_out = (width * config.n_embd for width in LORA_SITES[site])
    a, b = pair["A"], pair["B"]
    if len(a) != 2 or a[1] != width_in:
        raise Invalid("wrong_shape", f"{path}.A.weight must be (rank, {width_in}), not {list(a)}")
    if len(b) != 2 or b[0] != width_out:
        raise Invalid("wrong_shape", f"{path}.B.weight must be ({width_out}, rank), not {list(b)}")
    if a[0] != b[1]:
        raise Invalid("rank", f"{path}: A has rank {a[0]} and B rank {b[1]}")
    if not 1 <= a[0] <= max_rank:
        raise Invalid("rank", f"{path}: rank {a[0]} is outside 1..{max_rank}")
    return a[0]


def _check_classifier(
    shapes: Mapping[str, tuple[int, ...]], adapter: AdapterSet, config: GPTConfig
) -> tuple[str, ...]:
    weight, bias = shapes.get("classifier.weight"), shapes.get("classifier.bias")
    if weight is None:
        if bias is not None or "labels" in adapter.metadata:
            raise Invalid("labels", "labels or classifier.bias without classifier.weight")
        return ()
    labels = _parse_labels(adapter.metadata.get("labels"))
    if weight != (len(labels), config.n_embd):
        raise Invalid(
            "wrong_shape",
            f"classifier.weight must be ({len(labels)}, {config.n_embd}), not {list(weight)}",
        )
    if bias is not None and bias != (len(labels),):
        raise Invalid("wrong_shape", f"classifier.bias must be ({len(labels)},), not {list(bias)}")
    return labels


def _parse_labels(text: str | None) -> tuple[str, ...]:
    try:
        labels = json.loads(text or "null")
        json.dumps(labels, ensure_ascii=False).encode("utf-8")  # no lone surrogate is in it
    except (ValueError, RecursionError):
        labels = None
    proper = isinstance(labels, list) and all(isinstance(v, str) and v for v in labels)
    if not proper or not 1 <= len(labels) <= MAX_LABELS or len(set(labels)) < len(labels):
        raise Invalid(
            "labels", "a classifier needs metadata labels: a JSON list of distinct names, one a row"
        )
    return tuple(labels)


def _check_others(shapes: Mapping[str, tuple[int, ...]], config: GPTConfig) -> None:
    allowed = norm_shapes(config) | {
        "critic_head.weight": (1, config.n_embd),
        "calibration": (CALIBRATION_BUCKETS,),
        "cls_embedding": (config.n_embd,),
        **dict(zip(SEQUENCE_HEAD, ((1, config.n_embd), (1,), (1,)), strict=True)),
    }
    if "cls_embedding" in shapes and config.cls_token_id is None:
        raise Invalid("no_cls_token", "cls_embedding needs a trunk that has a cls_token_id")
    for number, (name, shape) in enumerate(shapes.items(), 1):
        if _LORA_NAME.fullmatch(name) or name in _CLASSIFIER_NAMES:
            continue
        if name not in allowed:
            raise _unknown(number, name, [*allowed, *_CLASSIFIER_NAMES, *_lora_names(config)])
        if shape != allowed[name]:
            raise Invalid("wrong_shape", f"{name} must be {list(allowed[name])}, not {list(shape)}")


def _check_sequence_head(shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in SEQUENCE_HEAD if name not in shapes]
    if 0 < len(missing) < len(SEQUENCE_HEAD):
        raise Invalid("missing_pair", f"the sequence head comes without its {missing[0]}")


def _unknown(number: int, name: str, known: Iterable[str]) -> Invalid:
    """An answer never holds what was sent: the tensor is told by its place in the header."""
    near = difflib.get_close_matches(name[:MAX_NAME], known, n=1)
    rest = f"; the nearest known is {near[0]}" if near else ""
    sentence = f"tensor {number} of the header has a name that this backbone does not know{rest}"
    return Invalid("unknown_tensor", sentence, tensor=number)


def _lora_names(config: GPTConfig) -> Iterator[str]:
    for layer, site, part in itertools.product(range(config.n_layer), LORA_SITES, "AB"):
        yield f"transformer.h.{layer}.{site}.{part}.weight"


def _check_norm_pairs(
    norms: list[str], shapes: Mapping[str, tuple[int, ...]], config: GPTConfig
) -> None:
    parts = ("weight", "bias") if config.bias else ("weight",)
    for norm in norms:
        for part in parts:
            if f"{norm}.{part}" not in shapes:
                raise Invalid("missing_pair", f"{norm} comes without its {part}")


def _check_values(name: str, tensor: Tensor, serving_dtype: torch.dtype) -> None:
    if not torch.isfinite(tensor.to(serving_dtype)).all():
        if torch.isfinite(tensor).all():
            raise Invalid("not_finite", f"{name} is finite, but not as {serving_dtype}")
        raise Invalid("not_finite", f"{name} has values that are not finite")
    if name == "calibration" and not ((tensor >= 0) & (tensor <= 1)).all():
        raise Invalid("calibration", "calibration must be 100 numbers from 0 to 1")


def _check_scaled(adapter: AdapterSet, serving_dtype: torch.dtype) -> None:
    """B is served with the scaling in it, so that product must be finite too."""
    for name, b in adapter.tensors.items():
        if name.endswith(".B.weight"):
            scaled = b.float() * adapter.scaling(b.shape[1])
            if not torch.isfinite(scaled.to(serving_dtype)).all():
                raise Invalid(
                    "not_finite", f"{name} times its scaling is not finite as {serving_dtype}"
                )
