"""The dtypes that embeddings are sent in: float32, float16 and bfloat16, little-endian."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from server.engine.errors import NonFiniteResult
from server.engine.job import Floats

DType = Literal["float32", "float16", "bfloat16"]


def packed(values: Floats, dtype: DType) -> bytes:
    """Little-endian numbers, rounded to the nearest. Raises NonFiniteResult for one too large."""
    if dtype == "float32":
        return values.astype("<f4").tobytes()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            halves = values.astype("<f2")
        _demand_finite(halves, dtype)
        return halves.tobytes()
    upper = _upper_halves(values)
    _demand_finite((upper.astype("<u4") << 16).view("<f4"), dtype)
    return upper.tobytes()


def rounded(values: Floats, dtype: DType) -> Floats:
    """The same numbers as float32. Raises NonFiniteResult for one that `dtype` cannot hold."""
    if dtype == "float32":
        return values
    data = packed(values, dtype)
    if dtype == "float16":
        return np.frombuffer(data, "<f2").astype(np.float32).reshape(values.shape)
    wide = np.frombuffer(data, "<u2").astype("<u4") << 16
    return wide.view("<f4").reshape(values.shape)


def _upper_halves(values: Floats) -> NDArray[np.uint16]:
    """bfloat16 is float32's upper half, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    halves: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return halves


def _demand_finite(values: NDArray[np.floating[Any]], name: str) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteResult(f"a number is too large for {name}: ask for float32, or normalize")
