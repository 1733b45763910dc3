"""What a server would say to files that are about to be written: asked before they are."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from adapters.errors import ImportRefused, NoEffect, TrunklineError
from adapters.library import Library, Upload
from adapters.slots import SlotPool
from model.checkpoint import Backbone
from model.encoder import FINAL, Encoder
from model.lora import AdapterWeights, LoraBatch
from model.packed import PackedBatch

PROBE_TOKENS = 32


def rehearse(
    backbone: Backbone, files: Mapping[str, bytes], dtype: torch.dtype, max_rank: int
) -> None:
    """Do with the trunk, and with adapter files by name, what a server does at its start.

    The files are published in a library of their own in a temporary folder: every check of an
    upload, the probe forward and the demand for an effect are the server's. Raises ImportRefused.
    """
    encoder = Encoder(backbone.config, backbone.tensors, dtype)
    _demand_finite(encoder)
    size = sum(map(len, files.values()))
    with tempfile.TemporaryDirectory(prefix="trunkline-import-") as folder:
        library = Library(
            Path(folder),
            backbone,
            encoder,
            lambda read: SlotPool(
                backbone.config,
                dtype,
                encoder.device,
                capacity_bytes=8 * size + (1 << 20),
                max_slots=0,
                read=read,
            ),
            max_rank=max_rank,
        )
        try:
            for name, data in files.items():
                _publish(library, name, data)
        finally:
            library.close()


def _publish(library: Library, name: str, data: bytes) -> None:
    incoming = library.store.incoming()
    try:
        incoming.write(data)
        library.publish(Upload(name, who="import"), incoming)
    except NoEffect as error:
        dtype = str(library.encoder.dtype).removeprefix("torch.")
        raise ImportRefused(
            f"the adapter set {name} changes nothing in {dtype}: is every B zero? A checkpoint of "
            "later in the training has an effect; --trunk-only imports the trunk without a set"
        ) from error
    except TrunklineError as error:
        raise ImportRefused(f"the adapter set {name}: {error.message}") from error
    finally:
        incoming.discard()


@torch.inference_mode()
def _demand_finite(encoder: Encoder) -> None:
    config = encoder.config
    length = min(PROBE_TOKENS, config.block_size)
    batch = PackedBatch(torch.arange(length) % config.vocab_size, [length])
    states = encoder.forward(batch, LoraBatch.of_rows(batch.lengths, [AdapterWeights()]))[FINAL]
    if not torch.isfinite(states).all():
        raise ImportRefused(
            f"a forward pass of the trunk in {encoder.dtype} gives values that are not finite: its "
            "weights are too large for that dtype"
        )
