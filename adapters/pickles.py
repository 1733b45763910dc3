"""Checkpoints of torch.save and meta.pkl, read as plain data: nothing in them is ever run."""

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.errors import ImportRefused
from adapters.pickle_scan import DAMAGED, Bytes, Immodest, scan
from adapters.torch_file import AsksForCode, read_torch_file

MAX_META_BYTES = 64 << 20
_AS_PLAIN = "save it again with tensors, numbers, strings, lists and dicts alone"


def load_checkpoint(path: Path) -> Mapping[str, Any]:
    """What torch.save wrote, zipped or in the old form. Raises ImportRefused."""
    _demand_file(path)
    try:
        saved = read_torch_file(path)
    except OSError as error:
        raise ImportRefused(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:  # an unpickler raises nearly anything
        raise ImportRefused(f"{path} {_what_is_wrong(path, error)}") from error
    if not isinstance(saved, Mapping):
        raise ImportRefused(
            f"{path} holds a {type(saved).__name__}, not a training checkpoint; what is imported "
            "is a dict with model and model_args, as train.py saves it"
        )
    return saved


def load_meta(path: Path) -> Mapping[str, Any]:
    """The data set's meta.pkl. Raises ImportRefused."""
    _demand_file(path)
    try:
        if path.stat().st_size > MAX_META_BYTES:
            raise ImportRefused(f"has more than {MAX_META_BYTES} bytes; a vocabulary has fewer")
        data = path.read_bytes()
        scan(Bytes(memoryview(data)))
        meta = _PlainUnpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise ImportRefused(f"{path} can't be read: {error.strerror or error}") from error
    except ImportRefused as error:
        raise ImportRefused(f"{path} {error}") from error
    except Exception as error:  # a broken pickle raises nearly anything
        why = f" that is taken: {error}" if _says_why(error) else ""
        raise ImportRefused(
            f"{path} is not a pickle file{why}; --meta is the meta.pkl that the data set's prepare "
            "script wrote"
        ) from error
    if not isinstance(meta, Mapping) or not isinstance(meta.get("stoi"), Mapping):
        raise ImportRefused(
            f"{path} has no vocabulary stoi, a dict from character to id; --meta is the meta.pkl "
            "of a data set of characters"
        )
    return meta


def _demand_file(path: Path) -> None:
    try:
        if path.is_file():
            with path.open("rb") as file:
                file.read(1)
            return
        kind = "is a folder" if path.is_dir() else "does not exist"
    except OSError as error:
        raise ImportRefused(f"{path} can't be read: {error.strerror}") from error
    if (path / "adapter_config.json").is_file():
        kind += " of PEFT's; `trunkline adapters import-peft` takes it"
    elif path.exists() and not path.is_dir():
        kind = "is not a plain file"
    raise ImportRefused(f"{path} {kind}")


def _what_is_wrong(path: Path, error: Exception) -> str:
    if isinstance(error, AsksForCode):
        return f"asks for {error.name[:100]}, and only plain tensors are read; {_AS_PLAIN}"
    with path.open("rb") as file:
        first = file.read(9)
    if first[8:9] == b"{":
        return (
            "is a safetensors file, not a checkpoint of torch.save; an adapter file needs no "
            "import: `trunkline adapters push` uploads it"
        )
    damaged = "; it is damaged or cut off" if zipfile.is_zipfile(path) or first[:2] == b"PK" else ""
    why = f" ({error})" if _says_why(error) else ""
    return f"is not a checkpoint of torch.save{damaged}{why}"


def _says_why(error: Exception) -> bool:
    return isinstance(error, Immodest) and str(error) != DAMAGED


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module}.{name}"[:100]
        raise ImportRefused(f"asks for {asked}, and only plain values are read")
