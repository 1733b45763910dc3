"""The adapter file: a safetensors header checked by ourselves before any tensor is made.

Stricter than the safetensors library, never laxer: what is not exactly as the format says is
refused with a reason, from the header alone where the header shows it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.errors import Invalid
from adapters.staging import write_whole

FORMAT = "trunkline-adapter/1"
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 8192
MAX_DIMENSIONS = 2
READ_BYTES = 4 << 20  # copied at once: a copy of 256 MB at once would hold the GIL for 0.2 s

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TORCH = (b"PK", b"\x80\x02")  # how files of torch.save begin, zipped and in the old form
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorEntry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the end of the header
    end: int


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int  # bytes from the start of the file


@dataclass(frozen=True)
class AdapterSet:
    """An adapter file in memory: tensors on the CPU in their stored dtypes."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    digest: str  # sha256:<64 hex> of the file

    @property
    def lora_alpha(self) -> float:
        return float(self.metadata["lora_alpha"])

    @property
    def use_rslora(self) -> bool:
        return self.metadata.get("use_rslora", "false") == "true"

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(json.loads(self.metadata.get("labels", "[]")))

    def scaling(self, rank: int) -> float:
        """alpha / r; with rsLoRA alpha / sqrt(r) (Kalajdzievski 2023)."""
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)


def parse_header(file: bytes | bytearray) -> Header:
    """The header of a whole file in memory. Raises Invalid; makes no tensor."""
    return _parse_header(file, len(file))


def read_header(path: Path) -> Header:
    """The header of a file on disk, and no more of it. Raises Invalid, OSError as open() does."""
    with path.open("rb") as file:
        first = file.read(9)
        return _parse_header(first + file.read(header_length(first) - 1), path.stat().st_size)


def _parse_header(first: bytes | bytearray, size: int) -> Header:
    """The header of a file of `size` bytes; `first` are its first bytes, with the whole header."""
    length = header_length(first)
    if length > size - 8:
        raise Invalid("truncated", "the header is said to be longer than the file")
    fields = _parse_json(bytes(first[8 : 8 + length]))
    metadata = _parse_metadata(fields.pop("__metadata__", {}))
    if not fields:
        raise Invalid("no_tensors", "the file has no tensors")
    if len(fields) > MAX_TENSORS:
        raise Invalid(
            "too_many_tensors", f"the file has {len(fields)} tensors, more than {MAX_TENSORS}"
        )
    tensors = {name: _parse_entry(entry) for name, entry in fields.items()}
    _check_ranges(tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def header_length(first: bytes | bytearray) -> int:
    """What a file's first bytes, 9 are enough, say of its header. Raises Invalid."""
    if len(first) < 8:
        raise Invalid("truncated", f"the file has {len(first)} bytes; a header length alone is 8")
    length = int.from_bytes(first[:8], "little")
    if length == 0 or first[8:9] not in (b"", b"{"):
        sentence = "the header does not begin with '{': not a safetensors file"
        if first[:2] in _TORCH:
            sentence += (
                "; of a checkpoint that torch.save wrote `trunkline import` makes an adapter file"
            )
        raise Invalid("not_safetensors", sentence)
    if length > MAX_HEADER_BYTES:
        raise Invalid(
            "header_too_large",
            f"the header is said to be {length} bytes long, more than {MAX_HEADER_BYTES}",
        )
    return length


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_int=_integer,
        )
        json.dumps(fields, ensure_ascii=False).encode("utf-8")  # no lone surrogate is in it
    except UnicodeDecodeError as error:
        raise Invalid("header_not_utf8", "the header is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise Invalid("header_not_json", "the header is not JSON") from error
    assert isinstance(fields, dict)  # it begins with '{'
    return fields


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise Invalid("duplicate_name", "the header has the same key twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _integer(text: str) -> int | float:
    """-0 is no size: a float here, as the safetensors library has it."""
    return -0.0 if text == "-0" else int(text)


def _parse_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise Invalid("bad_metadata", "__metadata__ must be an object of strings")
    return value


def _parse_entry(entry: Any) -> TensorEntry:
    if not isinstance(entry, dict) or set(entry) != _ENTRY_FIELDS:
        raise Invalid(
            "bad_entry", "a tensor's entry must have dtype, shape and data_offsets, no more"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Invalid("dtype", "a tensor has a dtype other than F32, F16 and BF16")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not 1 <= len(shape) <= MAX_DIMENSIONS or 0 in shape:
        raise Invalid("bad_shape", f"a shape must be 1 to {MAX_DIMENSIONS} positive integers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Invalid(
            "bad_offsets", "data_offsets must be two integers, the first not above the second"
        )
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise Invalid(
            "bad_offsets", "a tensor's byte range is not as long as its shape and dtype say"
        )
    return TensorEntry(DTYPES[dtype], tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _check_ranges(tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    end = 0
    for entry in sorted(tensors.values(), key=lambda entry: entry.start):
        if entry.start < end:
            raise Invalid("overlap", "two tensors' byte ranges overlap")
        if entry.start > end:
            raise Invalid("hole", "there are bytes between two tensors that belong to none")
        end = entry.end
    if end > data_bytes:
        raise Invalid("truncated", "the file ends before its last tensor does")
    if end < data_bytes:
        raise Invalid("trailing_bytes", "there are bytes after the last tensor")


def read_adapter(path: Path) -> AdapterSet:
    """Read and hash an adapter file. Raises Invalid for what is not one, OSError as open() does."""
    content = bytearray()
    with path.open("rb", buffering=0) as file:
        while part := file.read(READ_BYTES):
            content += part
    return parse_adapter(content)


def parse_adapter(file: bytearray) -> AdapterSet:
    """The same for a file in memory; its tensors are views of it."""
    header = parse_header(file)
    tensors = {
        name: torch.frombuffer(
            file,
            dtype=entry.dtype,
            count=math.prod(entry.shape),
            offset=header.data_start + entry.start,
        ).view(entry.shape)
        for name, entry in header.tensors.items()
    }
    return AdapterSet(tensors, header.metadata, f"sha256:{hashlib.sha256(file).hexdigest()}")


def adapter_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content: keys sorted, offsets in that order.

    The safetensors library orders metadata at random, so it would give each copy its own digest.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    names = {dtype: name for name, dtype in DTYPES.items()}
    parts: list[bytes] = []
    end = 0
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(raw)],
        }
        parts.append(raw)
        end += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin aligned, as the library has it
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def write_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    lora_alpha: float,
    base_digest: str | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter file, whole or not at all; metadata adds to what the arguments say."""
    fields = {"format": FORMAT, "lora_alpha": repr(float(lora_alpha))} | dict(metadata or {})
    if base_digest is not None:
        fields["base_digest"] = base_digest
    write_whole(path, adapter_bytes(tensors, fields))
