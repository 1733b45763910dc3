"""HostTier: adapters staged in host memory as they will lie on the device.

Between disk and a GPU: what was evicted from the device comes back without a read or a cast, as
one copy from pinned memory. On the CPU it would be the same memory twice, so none is used there.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters.format import AdapterSet
from adapters.weights import Cursor, placed_bytes, weights_of
from model.config import GPTConfig


@dataclass(frozen=True)
class Image:
    """A slot's bytes, and the adapter's shapes that say what is where in them."""

    buffer: Tensor  # (size,) uint8
    outline: AdapterSet  # on the meta device, but for the calibration table


class HostTier:
    """Images by digest, the least recently used dropped beyond `capacity_bytes`.

    Used by the loader thread alone.
    """

    def __init__(
        self, config: GPTConfig, dtype: torch.dtype, capacity_bytes: int, pin: bool = True
    ) -> None:
        self.config, self.dtype, self.capacity_bytes, self.pin = config, dtype, capacity_bytes, pin
        self._images: OrderedDict[str, Image] = OrderedDict()

    @property
    def bytes(self) -> int:
        return sum(image.buffer.numel() for image in self._images.values())

    def get(self, digest: str, read: Callable[[str], AdapterSet]) -> Image:
        """The image of `digest`, read and staged where it is not there."""
        if digest in self._images:
            self._images.move_to_end(digest)
            return self._images[digest]
        image = self._staged(read(digest))
        self._images[digest] = image
        while self.bytes > self.capacity_bytes and len(self._images) > 1:
            self._images.popitem(last=False)
        return image

    def _staged(self, adapter: AdapterSet) -> Image:
        size = placed_bytes(adapter, self.dtype)
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.pin)
        weights_of(adapter, self.config, self.dtype, Cursor(buffer))
        outline = {
            name: tensor if name == "calibration" else tensor.to("meta")
            for name, tensor in adapter.tensors.items()
        }
        return Image(buffer, replace(adapter, tensors=outline))
