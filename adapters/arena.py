"""Arena: one buffer allocated once, handed out in contiguous extents."""

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and more than any dtype or kernel asks for


@dataclass(frozen=True)
class Extent:
    """Bytes start..end of the arena."""

    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def aligned(size: int) -> int:
    """`size` bytes rounded up to ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Arena:
    """First fit over a list of free extents, neighbours merged. Not thread-safe.

    The lowest fit is taken, so memory that was never needed is never touched. A freed extent is
    filled with NaN (all bits set) with `poison`, so that a use after free shows.
    """

    def __init__(self, capacity: int, device: torch.device, poison: bool = False) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.poison = poison
        self.buffer = torch.empty(self.capacity, dtype=torch.uint8, device=device)
        self._free = [Extent(0, self.capacity)] if self.capacity else []  # by start

    @property
    def free_bytes(self) -> int:
        return sum(extent.bytes for extent in self._free)

    def allocate(self, size: int) -> Extent | None:
        """An extent of `size` bytes, rounded up to ALIGNMENT; None where no gap is that long."""
        size = aligned(size)
        for index, gap in enumerate(self._free):
            if gap.bytes >= size:
                rest = Extent(gap.start + size, gap.end)
                self._free[index : index + 1] = [rest] if rest.bytes else []
                return Extent(gap.start, gap.start + size)
        return None

    def free(self, extent: Extent) -> None:
        if self.poison:
            self.buffer[extent.start : extent.end].fill_(0xFF)
        merged: list[Extent] = []
        for gap in sorted([*self._free, extent], key=lambda gap: gap.start):
            if merged and merged[-1].end == gap.start:
                merged[-1] = Extent(merged[-1].start, gap.end)
            else:
                assert not merged or merged[-1].end < gap.start, "an extent was freed twice"
                merged.append(gap)
        self._free = merged

    def view(self, extent: Extent) -> Tensor:
        """Its bytes, (size,) uint8."""
        return self.buffer[extent.start : extent.end]
