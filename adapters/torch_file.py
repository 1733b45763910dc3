"""What torch.save wrote, read without torch.load: its tensors take no more than the file's bytes.

Plain values and tensors alone. A tensor is a view of bytes that are in the file: neither a size
that is stated nor a stride can make it larger.
"""

import io
import mmap
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.pickle_scan import DAMAGED, Bytes, Immodest, scan

MAX_PARTS = 100_000  # of the archive: two tensors in three training steps have fewer
MAX_DIMENSIONS = 16
# Bytes that different views of the storages may have together, in multiples of the storages and
# besides: each view may become a tensor of its own.
MOST_VIEWS, SMALL = 3, 1 << 20
_MAGIC = 0x1950A86A20F9469CFC6C  # of the form before the archive (PyTorch 1.5 and earlier)
_PROTOCOL = 1001

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class AsksForCode(ValueError):
    """The pickle names something that is neither a plain value nor a tensor."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Storage:
    dtype: torch.dtype
    key: str
    size: int  # elements, as stated; its bytes are checked when it is read


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is not read yet. Nothing in a pickle can change one."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


def read_torch_file(path: Path) -> Any:
    """The object, with the tensors of its dicts, and of the dicts in those, read.

    Raises AsksForCode, Immodest, OSError, or what a damaged pickle makes the unpickler raise.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path.stat().st_size)
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise Immodest("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            return _read_old_form(view)


# The archive.


def _read_archive(archive: zipfile.ZipFile, file_bytes: int) -> Any:
    parts = archive.infolist()
    if len(parts) > MAX_PARTS:
        raise Immodest(f"it has more than {MAX_PARTS:,} parts")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise Immodest("its parts are compressed, which torch.save does not do")
    stated = sum(max(part.file_size, part.compress_size) for part in parts)
    if stated > file_bytes:
        raise Immodest("its parts are said to be larger than the file")
    sizes = {part.filename: part.file_size for part in parts}
    folder = _folder_of(sizes)
    order = f"{folder}byteorder"
    if order in sizes and archive.read(order) not in (b"", sys.byteorder.encode()):
        raise Immodest("it was written on a machine of the other byte order")
    data = archive.read(f"{folder}data.pkl")

    def read(key: str) -> bytearray:
        name = f"{folder}data/{key}"
        if name not in sizes:
            raise Immodest("it lacks the values of a tensor")
        return bytearray(archive.read(name))

    scan(Bytes(memoryview(data)))
    return _with_tensors(_Unpickler(io.BytesIO(data)).load(), _Storages(read))


def _folder_of(names: Mapping[str, int]) -> str:
    found = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise Immodest("it has no data.pkl")
    return found[0].removesuffix("data.pkl")


# The old form: pickles one after the other, then the storages.


def _read_old_form(data: memoryview) -> Any:
    at = 0
    values: list[Any] = []
    for _ in range(5):  # magic number, protocol, the machine, the object, the storages' keys
        end = scan(Bytes(data, at))
        values.append(_Unpickler(io.BytesIO(bytes(data[at:end]))).load())
        if len(values) == 1 and values[0] != _MAGIC:
            raise Immodest("it is no pickle of torch.save")
        at = end
    _, protocol, machine, saved, keys = values
    if protocol != _PROTOCOL or not isinstance(keys, list):
        raise Immodest("it is of another form")
    if isinstance(machine, dict) and not machine.get("little_endian", True):
        raise Immodest("it was written on a machine of the other byte order")
    places = _places(data, at, keys, _dtypes_in(saved))

    def read(key: str) -> bytearray:
        if key not in places:
            raise Immodest("it lacks the values of a tensor")
        start, end = places[key]
        return bytearray(data[start:end])

    return _with_tensors(saved, _Storages(read))


def _places(
    data: memoryview, at: int, keys: Sequence[Any], dtypes: Mapping[str, torch.dtype]
) -> dict[str, tuple[int, int]]:
    """Where each storage's bytes are: a count of elements (int64), then the elements."""
    places = {}
    for key in keys:
        dtype = dtypes.get(key)
        if dtype is None:
            raise Immodest("it has values of no tensor")
        start = at + 8
        at = start + int.from_bytes(data[at:start], "little", signed=True) * dtype.itemsize
        if not start <= at <= len(data):
            raise Immodest("it is cut off")
        places[key] = (start, at)
    return places


def _dtypes_in(value: Any) -> dict[str, torch.dtype]:
    """By storage key, of every tensor anywhere in the object."""
    found: dict[str, torch.dtype] = {}
    waiting, seen = [value], set[int]()
    while waiting:
        each = waiting.pop()
        if isinstance(each, Stored):
            found[each.storage.key] = each.storage.dtype
        elif isinstance(each, (dict, list, tuple)) and id(each) not in seen:
            seen.add(id(each))
            waiting.extend(each.values() if isinstance(each, dict) else each)
    return found


# Values.


def _with_tensors(saved: Any, storages: "_Storages") -> Any:
    """The object; of nested dicts those of the second level are copied with their tensors."""

    def of(value: Any) -> Any:
        return storages.tensor(value) if isinstance(value, Stored) else value

    if not isinstance(saved, Mapping):
        return of(saved)
    return {
        key: {name: of(each) for name, each in value.items()}
        if key in ("model", "model_args") and isinstance(value, Mapping)
        else of(value)
        for key, value in saved.items()
    }


class _Storages:
    """The bytes of the file's storages, each read once, and the tensors that view them."""

    def __init__(self, read: Callable[[str], bytearray]) -> None:
        self._read = read
        self._known: dict[str, bytearray] = {}
        self._views: dict[Stored, Tensor] = {}
        self._viewed = 0  # bytes of all different views

    def tensor(self, stored: Stored) -> Tensor:
        """Raises Immodest for one that is larger than its bytes."""
        if stored not in self._views:
            self._views[stored] = self._view(stored)
        return self._views[stored]

    def _view(self, stored: Stored) -> Tensor:
        storage = stored.storage
        if storage.key not in self._known:
            self._known[storage.key] = self._read(storage.key)
        data = self._known[storage.key]
        itemsize = storage.dtype.itemsize
        available = min(storage.size, len(data) // itemsize)
        if storage.size > available:
            raise Immodest("a tensor is said to have more values than there are")
        last = stored.offset + sum(
            (length - 1) * step for length, step in zip(stored.shape, stored.stride, strict=True)
        )
        if stored.elements == 0:
            return torch.empty(stored.shape, dtype=storage.dtype)
        if last >= available or stored.elements > available:
            raise Immodest("a tensor is larger than its values: save it with .contiguous()")
        self._viewed += stored.elements * itemsize
        if self._viewed > MOST_VIEWS * sum(map(len, self._known.values())) + SMALL:
            raise Immodest("its tensors overlap: save each with .clone()")
        base = torch.frombuffer(data, dtype=storage.dtype, count=available)
        return base.as_strided(stored.shape, stored.stride, stored.offset)


class _Unpickler(pickle.Unpickler):
    """Plain values, storages and tensors; anything else that a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        found = _NAMES.get(f"{module}.{name}")
        if found is None:
            raise AsksForCode(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise Immodest(DAMAGED)
        _, dtype, key, _, size = pid[:5]
        if not isinstance(dtype, torch.dtype) or type(key) is not str or not _is_count(size):
            raise Immodest(DAMAGED)
        if len(pid) > 5 and pid[5] is not None:
            raise Immodest("it has storages that are views: save its tensors with .clone()")
        return Storage(dtype, key, size)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _rebuilt(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Stored:
    """A tensor of these; what follows is of training: requires_grad, hooks, metadata."""
    proper = (
        isinstance(storage, Storage)
        and isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride) <= MAX_DIMENSIONS
        and all(map(_is_count, (offset, *shape, *stride)))
    )
    if not proper:
        raise Immodest(DAMAGED)
    return Stored(storage, offset, shape, stride)


def _first(data: Any = (), *_: Any) -> Any:
    """Returns the first argument in place of the set or the bytes that the file would build.

    Nothing that is imported is a set or bytes.
    """
    return data


def _nothing_but(kind: Callable[[], Any]) -> Callable[[], Any]:
    """An empty container: what is in it follows in the pickle, and so costs its bytes there."""

    def make() -> Any:
        return kind()

    return make


_NAMES: Mapping[str, Any] = {
    "collections.OrderedDict": _nothing_but(OrderedDict),
    "collections.Counter": _nothing_but(Counter),
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _first,
    "builtins.set": _first,
    "__builtin__.set": _first,
    "_codecs.encode": _first,
    "torch.device": lambda *parts: ":".join(map(str, parts))[:64],
}
