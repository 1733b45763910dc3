"""Adapter files that must be refused, each with its reason: BAD_INPUTS, "Adapter files"."""

import json
import math
from collections.abc import Mapping

import torch
from conftest import TINY, random_adapter
from torch import Tensor

from adapters.format import FORMAT, MAX_HEADER_BYTES, adapter_bytes


def file_of(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def entry(**changes: object) -> str:
    """A header of one tensor `a`, of 2 x 3 float32 and so 24 bytes, but for the changes."""
    fields = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes
    return json.dumps({"a": fields})


ENTRY = '"{}":{{"dtype":"F32","shape":[2],"data_offsets":[{}]}}'


def two_entries(first: str, second: str, name: str = "b") -> str:
    return f"{{{ENTRY.format('a', first)},{ENTRY.format(name, second)}}}"


HEADER_FAULTS = {
    "empty file": (b"", "truncated"),
    "7 bytes": (b"\1\0\0\0\0\0\0", "truncated"),
    "header length 0": (file_of(b""), "not_safetensors"),
    "header length 2^64-1": (b"\xff" * 8 + b"{}", "header_too_large"),
    "header over the cap": (file_of(b"{" + b" " * MAX_HEADER_BYTES), "header_too_large"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "header not UTF-8": (file_of(b'{"\xff":1}'), "header_not_utf8"),
    "header an array": (file_of("[]"), "not_safetensors"),
    "header not JSON": (file_of("{a}"), "header_not_json"),
    "header of depth 100,000": (file_of('{"a":' + "[" * 100_000), "header_not_json"),
    "leading spaces": (file_of(" " + entry(), bytes(24)), "not_safetensors"),
    "no tensors": (file_of("{}"), "no_tensors"),
    "metadata only": (file_of('{"__metadata__":{"a":"b"}}'), "no_tensors"),
    "metadata not strings": (file_of('{"__metadata__":{"a":1}}'), "bad_metadata"),
    "duplicate name": (file_of(two_entries("0,8", "8,16", "a"), bytes(16)), "duplicate_name"),
    "duplicate name, escaped": (
        file_of(two_entries("0,8", "8,16", "\\u0061"), bytes(16)),
        "duplicate_name",
    ),
    "lone surrogate": (
        file_of(two_entries("0,8", "8,16", "\\ud800"), bytes(16)),
        "header_not_json",
    ),
    "unknown field": (file_of(entry(extra=1), bytes(24)), "bad_entry"),
    "missing field": (file_of('{"a":{"dtype":"F32","shape":[2]}}', bytes(8)), "bad_entry"),
    "overlap": (file_of(two_entries("0,8", "4,12"), bytes(12)), "overlap"),
    "hole": (file_of(two_entries("0,8", "12,20"), bytes(20)), "hole"),
    "hole in front": (file_of(entry(data_offsets=[4, 28]), bytes(28)), "hole"),
    "trailing bytes": (file_of(entry(), bytes(24) + b"PK\3\4"), "trailing_bytes"),
    "truncated": (file_of(entry(), bytes(23)), "truncated"),
    "negative offset": (file_of(entry(data_offsets=[-24, 0]), bytes(24)), "bad_offsets"),
    "negative zero": (file_of(entry().replace("[0,", "[-0,"), bytes(24)), "bad_offsets"),
    "reversed offsets": (file_of(entry(data_offsets=[24, 0]), bytes(24)), "bad_offsets"),
    "offsets too short": (file_of(entry(data_offsets=[0, 20]), bytes(20)), "bad_offsets"),
    "three offsets": (file_of(entry(data_offsets=[0, 24, 24]), bytes(24)), "bad_offsets"),
    "product overflow": (file_of(entry(shape=[2**33, 2**33]), bytes(24)), "bad_offsets"),
    "shape [0, 2^62]": (file_of(entry(shape=[0, 2**62], data_offsets=[0, 0])), "bad_shape"),
    "1,000 dimensions": (file_of(entry(shape=[1] * 1000), bytes(24)), "bad_shape"),
    "a scalar": (file_of(entry(shape=[], data_offsets=[0, 4]), bytes(4)), "bad_shape"),
    "fractional shape": (file_of(entry(shape=[2.0, 3]), bytes(24)), "bad_shape"),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.", "not_safetensors"),
    "ZIP": (b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00", "not_safetensors"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "not_safetensors"),
} | {
    f"dtype {dtype}": (file_of(entry(dtype=dtype), bytes(24)), "dtype")
    for dtype in ("F64", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "U64", "C64")
}

QKV = "transformer.h.0.attn.lora_qkv"
A, B = f"{QKV}.A.weight", f"{QKV}.B.weight"
WIDTH = TINY.n_embd


def set_bytes(
    base_digest: str | None,
    changes: Mapping[str, Tensor | None] | None = None,
    metadata: Mapping[str, str | None] | None = None,
    *,
    seed: int = 7,
    **options: object,
) -> bytes:
    """A random adapter of TINY's, with these tensors and metadata put in, or out where None."""
    fields = {"format": FORMAT, "lora_alpha": "8.0", "base_digest": base_digest}
    classes = options.get("classes", 0)
    if classes:
        fields["labels"] = json.dumps([f"label-{i}" for i in range(classes)])
    tensors = random_adapter(TINY, seed, **options) | dict(changes or {})
    return adapter_bytes(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        {k: v for k, v in (fields | dict(metadata or {})).items() if v is not None},
    )


def _with(value: float, *shape: int) -> Tensor:
    tensor = torch.randn(shape)
    tensor.view(-1)[-1] = value
    return tensor


def _sequence_head(**changes: Tensor | None) -> dict[str, Tensor | None]:
    """A sound sequence head but for the changes; None leaves a tensor out."""
    head = {"base_predictor.weight": torch.ones(1, WIDTH), "A": torch.ones(1), "B": torch.ones(1)}
    return {f"sequence_head.{name}": tensor for name, tensor in (head | changes).items()}


def _ranks(a: int, b: int) -> dict[str, Tensor]:
    return {A: torch.randn(a, WIDTH), B: torch.randn(3 * WIDTH, b)}


_TENSOR_FAULTS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "A too wide": ({A: torch.ones(4, WIDTH + 1)}, "wrong_shape"),
    "A of one dimension": ({A: torch.ones(4 * WIDTH)}, "wrong_shape"),
    "B too tall": ({B: torch.ones(3 * WIDTH + 1, 4)}, "wrong_shape"),
    "A transposed": ({A: torch.ones(WIDTH, 4)}, "wrong_shape"),
    "LayerNorm of another width": ({"transformer.ln_f.weight": torch.ones(5)}, "wrong_shape"),
    "critic of two rows": ({"critic_head.weight": torch.ones(2, WIDTH)}, "wrong_shape"),
    "calibration of 99": ({"calibration": torch.ones(99)}, "wrong_shape"),
    "calibration of two dimensions": ({"calibration": torch.ones(100, 1)}, "wrong_shape"),
    "CLS embedding of another width": ({"cls_embedding": torch.ones(5)}, "wrong_shape"),
    "sequence head of two rows": (
        _sequence_head(**{"base_predictor.weight": torch.ones(2, WIDTH)}),
        "wrong_shape",
    ),
    "sequence head with two scales": (_sequence_head(A=torch.ones(2)), "wrong_shape"),
    "sequence head without its A": (_sequence_head(A=None), "missing_pair"),
    "sequence head without its weight": (
        _sequence_head(**{"base_predictor.weight": None}),
        "missing_pair",
    ),
    "a NaN in the sequence head": (_sequence_head(B=torch.full((1,), math.nan)), "not_finite"),
    "an infinity in the CLS embedding": ({"cls_embedding": _with(math.inf, WIDTH)}, "not_finite"),
    "layer out of range": (
        {A.replace(".0.", ".2."): torch.ones(4, WIDTH)},
        "layer_out_of_range",
    ),
    "layer far out of range": (
        {A.replace(".0.", ".999999."): torch.ones(4, WIDTH)},
        "layer_out_of_range",
    ),
    "A without B": ({B: None}, "missing_pair"),
    "B without A": ({A: None}, "missing_pair"),
    "LayerNorm without its bias": ({"transformer.ln_f.weight": torch.ones(WIDTH)}, "missing_pair"),
    "LayerNorm without its weight": ({"transformer.ln_f.bias": torch.ones(WIDTH)}, "missing_pair"),
    "rank over the maximum": (_ranks(65, 65), "rank"),
    "A and B of different rank": (_ranks(4, 5), "rank"),
    "a NaN in A": ({A: _with(math.nan, 4, WIDTH)}, "not_finite"),
    "an infinity in B": ({B: _with(math.inf, 3 * WIDTH, 4)}, "not_finite"),
    "a negative infinity in the critic": (
        {"critic_head.weight": _with(-math.inf, 1, WIDTH)},
        "not_finite",
    ),
    "a NaN in the calibration": ({"calibration": _with(math.nan, 100)}, "not_finite"),
    "B is finite but not with its scaling": ({B: _with(3e38, 3 * WIDTH, 4)}, "not_finite"),
    "calibration above 1": ({"calibration": torch.full((100,), 1.5)}, "calibration"),
    "calibration below 0": ({"calibration": torch.full((100,), -0.1)}, "calibration"),
} | {
    f"a tensor named {name[:40]!a}": ({name: torch.ones(4, WIDTH)}, "unknown_tensor")
    for name in (
        "",
        "transformer.wte.weight",
        "shared.attn.c_attn.weight",
        f"_orig_mod.{A}",
        f"{A}\n",
        f"{A}\0",
        A.upper(),
        A.replace("A.weight", "A.bias"),
        A.replace("A.weight", "C.weight"),
        A.replace(".0.", ".00."),
        A.replace(".0.", ".-1."),
        A.replace(".0.", ".\N{ARABIC-INDIC DIGIT ONE}."),
        A.replace(".0.", f".{'9' * 300}."),
        "\N{PILE OF POO}" * 5000,
        "transformer.h.0.ln_3.weight",
        "../../etc/passwd",
    )
}

_METADATA_FAULTS: dict[str, tuple[dict[str, str | None], str]] = {
    "no lora_alpha": ({"lora_alpha": None}, "lora_alpha"),
    "base digest of another backbone": ({"base_digest": "sha256:" + "0" * 64}, "base_digest"),
    "base digest empty": ({"base_digest": ""}, "base_digest"),
    "another format": ({"format": "trunkline-adapter/2"}, "bad_metadata"),
    "use_rslora neither true nor false": ({"use_rslora": "yes"}, "bad_metadata"),
    "labels without a classifier": ({"labels": '["a"]'}, "labels"),
} | {
    f"lora_alpha {alpha!a}": ({"lora_alpha": alpha}, "lora_alpha")
    for alpha in ("", "0", "-0.0", "-8", "nan", "inf", "1e999", "eight", "0x8", "8,0")
}

_CLASSIFIER_FAULTS: dict[str, str | None] = {
    "no labels": None,
    "labels not JSON": "a,b,c",
    "labels an object": '{"a": 1, "b": 2, "c": 3}',
    "labels of numbers": "[1, 2, 3]",
    "a label twice": '["a", "b", "a"]',
    "an empty label": '["a", "b", ""]',
    "no label": "[]",
    "a label with a lone surrogate": '["a", "b", "\\ud800"]',
    "labels too deep": "[" * 100_000,
}


def set_faults(base_digest: str) -> dict[str, tuple[bytes, str]]:
    """Sound safetensors files that the backbone TINY can't apply, with their reasons."""
    faults = {
        fault: (set_bytes(base_digest, tensors), reason)
        for fault, (tensors, reason) in _TENSOR_FAULTS.items()
    }
    for fault, (metadata, reason) in _METADATA_FAULTS.items():
        faults[fault] = set_bytes(base_digest, metadata=metadata), reason
    for fault, labels in _CLASSIFIER_FAULTS.items():
        faults[fault] = set_bytes(base_digest, None, {"labels": labels}, classes=3), "labels"
    rows = {"classifier.weight": torch.ones(2, WIDTH)}, {"classifier.bias": torch.ones(2)}
    for name, changes in zip(("weight", "bias"), rows, strict=True):
        file = set_bytes(base_digest, changes, classes=3)
        faults[f"classifier {name} of too few rows"] = file, "wrong_shape"
    lone_bias = set_bytes(base_digest, {"classifier.bias": torch.ones(3)})
    faults["classifier bias alone"] = lone_bias, "labels"
    return faults


SET_FAULTS = tuple(set_faults(""))
