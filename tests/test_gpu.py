"""On a GPU: the same answers as the reference, and adapters that come back from pinned memory.

None of these has been run yet: where they were written there was no GPU.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Serve
from reference import Oracle

TEXTS = ["To be, or not to be", "that is the question", "Whether", "tis nobler in the mind " * 2]
ADAPTERS = ["base", "ckpt_a", "ckpt_b"]
TOLERANCE = 2e-4  # max abs, float32: the kit's own
COSINE = 0.999  # of a pooled row in bfloat16 to float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def rows_of(serve: Serve, backbone: Path, *options: str) -> np.ndarray:
    """(texts, adapters, C): every text under every adapter, out of one batch, twice over."""
    served = serve(backbone, "--device", "cuda", *options)
    body = {"adapters": ADAPTERS, "inputs": TEXTS}
    with served.client() as client:
        assert client.get("/info").json()["device"].startswith("cuda")
        first, again = (
            [row["embedding"] for row in client.post("/encode", json=body).json()["data"]]
            for _ in range(2)
        )
    np.testing.assert_allclose(again, first, rtol=0, atol=TOLERANCE)
    return np.array(first).reshape(len(TEXTS), len(ADAPTERS), -1)


@pytest.fixture(scope="module")
def expected(kit_backbone: Path) -> np.ndarray:
    oracle = Oracle(kit_backbone)
    names = [None if name == "base" else name for name in ADAPTERS]
    ids = [oracle.ids(text) for text in TEXTS]
    return np.array([[oracle.embedding(row, name).numpy() for name in names] for row in ids])


def test_float32_on_a_gpu_equals_the_reference(
    kit_backbone: Path, serve: Serve, expected: np.ndarray
) -> None:
    found = rows_of(serve, kit_backbone, "--dtype", "float32")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_bfloat16_on_a_gpu_is_near_the_reference(
    kit_backbone: Path, serve: Serve, expected: np.ndarray
) -> None:
    found = rows_of(serve, kit_backbone, "--dtype", "bfloat16")
    assert (np.einsum("tac,tac->ta", found, expected) >= COSINE).all()


def test_adapters_evicted_to_pinned_memory_come_back_the_same(
    kit_backbone: Path, serve: Serve, expected: np.ndarray
) -> None:
    served = serve(kit_backbone, "--device", "cuda", "--dtype", "float32", "--slots", "1")
    with served.client() as client:
        for _ in range(3):
            for place, name in enumerate(ADAPTERS[1:], 1):
                body = {"adapter": name, "inputs": TEXTS}
                rows = client.post("/encode", json=body).json()["data"]
                found = np.array([row["embedding"] for row in rows])
                np.testing.assert_allclose(found, expected[:, place], rtol=0, atol=TOLERANCE)
        assert client.get("/info").json()["slots"]["evictions"] >= 4
