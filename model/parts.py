"""Part: some of a batch's sequences, laid out to go through all layers together."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.lora import LoraBatch, Segment
from model.packed import PackedBatch


@dataclass(frozen=True)
class Part:
    """Tokens start..end of a whole batch, whole sequences of it.

    `batch` and `lora` are the part's own. Where its layout has gaps, `places` (end - start,) are
    the places of the real tokens in it; None is no gaps.
    """

    start: int
    end: int
    batch: PackedBatch
    lora: LoraBatch
    places: Tensor | None

    def real(self, state: Tensor) -> Tensor:
        """The real tokens' rows of a state (N, C) of this part: (end - start, C)."""
        return state if self.places is None else state[self.places]


def parts_of(
    batch: PackedBatch,
    lora: LoraBatch,
    max_tokens: int,
    align: int = 1,
    align_adapters: bool = True,
) -> Iterator[Part]:
    """Parts of about equal size, of at most max_tokens real tokens or of one sequence, in order.

    A part's tokens are a multiple of `align`, and with `align_adapters` each adapter's in it too:
    matrix kernels that are compiled for each number of rows then meet few numbers.
    """
    for first, last in _cuts(batch, max_tokens):
        yield _part(batch, lora, first, last, align, align_adapters)


def _cuts(batch: PackedBatch, max_tokens: int) -> Iterator[tuple[int, int]]:
    """(first, last) sequence of each part: what is left is shared evenly by as few as can be."""
    begins, first = [*batch.starts, batch.starts[-1] + batch.lengths[-1]], 0
    while first < len(batch.lengths):
        left = begins[-1] - begins[first]
        most = begins[first] + max_tokens
        share = begins[first] + left / -(-left // max_tokens)
        last = first + 1
        while last < len(batch.lengths) and begins[last + 1] <= most:
            if abs(begins[last + 1] - share) > abs(begins[last] - share):
                break
            last += 1
        yield first, last
        first = last


def _part(
    batch: PackedBatch, lora: LoraBatch, first: int, last: int, align: int, align_adapters: bool
) -> Part:
    lengths = batch.lengths[first:last]
    start = batch.starts[first]
    end = batch.starts[last - 1] + batch.lengths[last - 1]
    ids, own = batch.ids[start:end], lora.between(start, end)
    aligns = [align if align_adapters else 1 for _ in own.segments[1:]] + [align]
    gaps, segments = _aligned(own.segments, aligns)
    if segments[-1].end == end - start:
        return Part(start, end, PackedBatch(ids, lengths), own, None)
    shift = torch.repeat_interleave(
        torch.tensor(gaps), torch.tensor([s.end - s.start for s in own.segments])
    )
    places = torch.arange(end - start) + shift  # (end - start,)
    spread = torch.zeros(segments[-1].end, dtype=ids.dtype)
    places, spread = places.to(ids.device), spread.to(ids.device)
    spread[places] = ids
    starts = [int(shift[s - start]) + s - start for s in batch.starts[first:last]]
    return Part(start, end, PackedBatch(spread, lengths, starts), LoraBatch(segments), places)


def _aligned(segments: list[Segment], aligns: list[int]) -> tuple[list[int], list[Segment]]:
    """By how many tokens each segment moves, and the segments with the gaps after them in them."""
    gaps, moved = [], []
    gap = 0
    for s, align in zip(segments, aligns, strict=True):
        gaps.append(gap)
        begin = s.start + gap
        gap += -(s.end + gap) % align
        moved.append(Segment(begin, s.end + gap, s.adapter))
    return gaps, moved
