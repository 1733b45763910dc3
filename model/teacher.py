"""A teacher's vectors for the rows of a corpus, and for the vocabulary learnt from it."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.corpus import DataError
from model.gpt import GPT

EMBEDDING_STD = 0.04  # twice that of a fresh wte: the teacher's words are worth keeping


def read_teacher(path: Path, rows: int, gpt: GPT, fresh: bool) -> Tensor:
    """The teacher's vectors `rows`, (rows, C); its `wte` (V, C), if any, goes into a fresh model.

    Raises DataError for a file that is not safetensors, or not of this corpus and model.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(path, None, f"not a teacher's vectors: {error}") from error
    width = gpt.config.n_embd
    expected = {"rows": (rows, width), "wte": tuple(gpt.wte.weight.shape)}
    if "rows" not in tensors:
        raise DataError(path, None, "the tensor 'rows' is missing")
    for name, tensor in tensors.items():
        shape = expected.get(name)
        if shape is None or tuple(tensor.shape) != shape or not tensor.isfinite().all():
            raise DataError(path, None, f"{name} {list(tensor.shape)} where {shape} was expected")
    if "wte" in tensors and fresh:
        wte = tensors["wte"].float()
        gpt.wte.weight.data.copy_(wte * (EMBEDDING_STD / wte.std()))
    return tensors["rows"].float()
