"""SlotFiller: brings an adapter from disk or host memory into its room in the arena."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.format import AdapterSet
from adapters.host_tier import HostTier, Image
from adapters.weights import Cursor, placed_bytes, weights_of
from model.config import GPTConfig
from model.lora import AdapterWeights


@dataclass(frozen=True)
class Source:
    """An adapter that was read; with an image its tensors are on the meta device."""

    adapter: AdapterSet
    image: Image | None
    size: int  # placed bytes


class SlotFiller:
    """Used by the loader thread alone."""

    def __init__(
        self,
        config: GPTConfig,
        dtype: torch.dtype,
        read: Callable[[str], AdapterSet],
        host_tier: HostTier | None,
    ) -> None:
        self.config, self.dtype = config, dtype
        self._read, self._host_tier = read, host_tier
        self._parked: Source | None = None

    def read(self, digest: str) -> Source:
        """Raises TrunklineError as the library's own read does."""
        parked, self._parked = self._parked, None
        if parked is not None and parked.adapter.digest == digest:
            return parked
        if self._host_tier is not None:
            image = self._host_tier.get(digest, self._read)
            return Source(image.outline, image, placed_bytes(image.outline, self.dtype))
        adapter = self._read(digest)
        return Source(adapter, None, placed_bytes(adapter, self.dtype))

    def park(self, source: Source) -> None:
        """Keep what was read for a load that has no room yet. It holds one at a time."""
        self._parked = source

    def fill(self, room: Tensor, source: Source) -> AdapterWeights:
        """The weights, as views of `room`, (size,) uint8 of the arena."""
        if source.image is not None:
            room.copy_(source.image.buffer)  # one copy to the device, from pinned memory
        cursor = Cursor(room, copy=source.image is None)
        return weights_of(source.adapter, self.config, self.dtype, cursor)
