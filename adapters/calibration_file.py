"""The training code's calibration.json: from checkpoint path to 100 numbers, one a bucket."""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from adapters.errors import ImportRefused
from model.heads import CALIBRATION_BUCKETS

FILE_NAME = "calibration.json"


def calibration_of(file: Path, ckpt: Path) -> tuple[Tensor | None, str]:
    """The table (100,) of this checkpoint, and a sentence that says which entry it is.

    The entry whose path is the checkpoint's, else the only one with its file name; None where
    none or several fit. Raises ImportRefused for a file that is not such an object.
    """
    tables = _read(file)
    same_path = [key for key in tables if _is_path_of(key, ckpt)]
    same_name = [key for key in tables if _file_name(key) == ckpt.name]
    fitting = same_path or same_name
    if len(fitting) == 1:
        return _table(file, fitting[0], tables[fitting[0]]), f"entry {fitting[0]} of {file}"
    if not fitting:
        return None, f"{file} has no entry for {ckpt.name}; its entries are {_listed(tables)}"
    return None, f"{file} has {len(fitting)} entries for {ckpt.name}: {_listed(fitting)}"


def _read(file: Path) -> Mapping[str, Any]:
    try:
        tables = json.loads(file.read_bytes())
    except OSError as error:
        raise ImportRefused(f"{file} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ImportRefused(f"{file} is not JSON; mend it or give --no-calibration") from error
    if not isinstance(tables, dict):
        raise ImportRefused(
            f"{file} holds a {type(tables).__name__}, not an object from checkpoint path to "
            f"{CALIBRATION_BUCKETS} numbers; mend it or give --no-calibration"
        )
    return tables


def _table(file: Path, key: str, values: Any) -> Tensor:
    proper = isinstance(values, list) and all(
        type(v) in (int, float) and 0 <= v <= 1
        for v in values  # neither NaN nor Infinity is
    )
    if not proper or len(values) != CALIBRATION_BUCKETS:
        raise ImportRefused(
            f"entry {key} of {file} is not a list of {CALIBRATION_BUCKETS} numbers from 0 to 1; "
            "mend it or give --no-calibration"
        )
    return torch.tensor(values, dtype=torch.float32)


def _is_path_of(key: str, ckpt: Path) -> bool:
    return os.path.normpath(key) == os.path.normpath(ckpt) or Path(key) == ckpt.absolute()


def _file_name(key: str) -> str:
    """The last part of a path that may have been written on Windows."""
    return PurePath(key.replace("\\", "/")).name


def _listed(keys: Any) -> str:
    some = list(keys)[:5]
    more = f" and {len(keys) - len(some)} more" if len(keys) > len(some) else ""
    return (", ".join(some) or "none") + more
