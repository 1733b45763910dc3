"""PackedBatch: sequences in one row of tokens, and attention within each of them."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F


class PackedBatch:
    """B sequences in one row of N tokens.

    ids (N,) int64; lengths and starts have B entries; positions (N,) restart at each sequence.
    Without `starts` the sequences lie end to end; with them there may be gaps, whose tokens mean
    nothing and whose states are nobody's. `groups` is the plan for attention: sequences of one
    length share a call.
    """

    def __init__(
        self, ids: Tensor, lengths: Sequence[int], starts: Sequence[int] | None = None
    ) -> None:
        self.ids = ids
        self.lengths = list(lengths)
        ends = list(accumulate(self.lengths))
        if min(self.lengths, default=1) < 1 or (starts is None and sum(lengths) != ids.shape[0]):
            raise ValueError(
                f"lengths add up to {sum(lengths)} tokens, each at least 1; ids has {len(ids)}"
            )
        self.starts = [0, *ends][:-1] if starts is None else list(starts)
        self.gaps = starts is not None

    @cached_property
    def positions(self) -> Tensor:
        positions = torch.zeros(self.ids.shape[0], dtype=torch.int64)
        for start, length in zip(self.starts, self.lengths, strict=True):
            positions[start : start + length] = torch.arange(length)
        return positions.to(self.ids.device)

    @cached_property
    def groups(self) -> list[tuple[int, slice | Tensor]]:
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


def attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sequence: q, k, v (N, H, D) -> (N, H, D)."""
    # gaps go through every operator too: zeros keep them finite
    out = torch.zeros_like(v) if batch.gaps else torch.empty_like(v)
    for length, tokens in batch.groups:
        rows = (-1, length, *q.shape[1:])
        y = F.scaled_dot_product_attention(  # (R, H, T, D)
            q[tokens].view(rows).transpose(1, 2),
            k[tokens].view(rows).transpose(1, 2),
            v[tokens].view(rows).transpose(1, 2),
        )
        out[tokens] = y.transpose(1, 2).flatten(0, 1)
    return out
