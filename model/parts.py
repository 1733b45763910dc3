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


def parts_of(batch: PackedBatch, lora: LoraBatch, max_tokens: int, align: int) -> Iterator[Part]:
    """Parts of at most max_tokens real tokens, or of one sequence, in the batch's order.

    Each adapter's tokens begin at a multiple of `align` and so does what follows them: matrix
    kernels that are compiled for each number of rows then meet few numbers.
    """
    first = 0
    for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        if row > first and start + length - batch.starts[first] > max_tokens:
            yield _part(batch, lora, first, row, align)
            first = row
    if batch.lengths:
        yield _part(batch, lora, first, len(batch.lengths), align)


def _part(batch: PackedBatch, lora: LoraBatch, first: int, last: int, align: int) -> Part:
    lengths = batch.lengths[first:last]
    start = batch.starts[first]
    end = batch.starts[last - 1] + batch.lengths[last - 1]
    ids, own = batch.ids[start:end], lora.between(start, end)
    if all(s.end % align == 0 for s in own.segments):
        return Part(start, end, PackedBatch(ids, lengths), own, None)
    gaps, segments = _aligned(own.segments, align)
    shift = torch.repeat_interleave(
        torch.tensor(gaps), torch.tensor([s.end - s.start for s in own.segments])
    )
    places = torch.arange(end - start) + shift  # (end - start,)
    spread = torch.zeros(segments[-1].end, dtype=ids.dtype)
    places, spread = places.to(ids.device), spread.to(ids.device)
    spread[places] = ids
    starts = [int(shift[s - start]) + s - start for s in batch.starts[first:last]]
    return Part(start, end, PackedBatch(spread, lengths, starts), LoraBatch(segments), places)


def _aligned(segments: list[Segment], align: int) -> tuple[list[int], list[Segment]]:
    """By how many tokens each segment moves, and the segments with their gaps in them."""
    gaps, moved = [], []
    gap = 0
    for s in segments:
        gaps.append(gap)
        begin = s.start + gap
        gap += -(s.end - s.start) % align
        moved.append(Segment(begin, s.end + gap, s.adapter))
    return gaps, moved
