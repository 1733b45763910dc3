"""PackedBatch: sequences laid end to end without padding, and attention within each of them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class PackedBatch:
    """B sequences as one row of N tokens.

    ids (N,) int64; lengths and starts have B entries; positions (N,) restart at each sequence.
    `groups` is the plan for attention: sequences of one length share a call.
    """

    def __init__(self, ids: Tensor, lengths: Sequence[int]) -> None:
        self.ids = ids
        self.lengths = list(lengths)
        self.starts: list[int] = []
        end = 0
        for length in self.lengths:
            self.starts.append(end)
            end += length
        if end != ids.shape[0] or min(self.lengths, default=1) < 1:
            raise ValueError(f"lengths add up to {end} tokens, each at least 1; ids has {len(ids)}")
        self.positions = torch.cat([torch.arange(n) for n in self.lengths]).to(ids.device)
        self.groups = self._group_by_length()

    def _group_by_length(self) -> list[tuple[int, slice | Tensor]]:
        """(length, tokens) a group: the tokens as a slice where they stand together."""
        rows = defaultdict(list)
        for start, length in zip(self.starts, self.lengths, strict=True):
            rows[length].append(start)
        groups: list[tuple[int, slice | Tensor]] = []
        for length, starts in rows.items():
            span = starts[-1] + length - starts[0]
            if span == length * len(starts):
                groups.append((length, slice(starts[0], starts[0] + span)))
            else:
                tokens = torch.tensor(starts)[:, None] + torch.arange(length)  # (R, T)
                groups.append((length, tokens.flatten().to(self.ids.device)))
        return groups

    def micro_batches(self, max_tokens: int) -> Iterator[tuple[int, "PackedBatch"]]:
        """(first token, part) for parts of whole sequences, of max_tokens or one sequence."""
        lengths: list[int] = []
        start = end = 0
        for length in self.lengths:
            if lengths and end - start + length > max_tokens:
                yield start, PackedBatch(self.ids[start:end], lengths)
                lengths, start = [], end
            lengths.append(length)
            end += length
        if lengths:
            yield start, PackedBatch(self.ids[start:end], lengths)


def attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sequence: q, k, v (N, H, D) -> (N, H, D)."""
    out = torch.empty_like(v)
    for length, tokens in batch.groups:
        rows = (-1, length, *q.shape[1:])
        y = F.scaled_dot_product_attention(  # (R, H, T, D)
            q[tokens].view(rows).transpose(1, 2),
            k[tokens].view(rows).transpose(1, 2),
            v[tokens].view(rows).transpose(1, 2),
        )
        out[tokens] = y.transpose(1, 2).flatten(0, 1)
    return out
