"""Batches as the peers take them: padded, with a mask where anything is padding."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.gpt import GPT


class Padded(nn.Module):
    """The states after ln_f of a padded batch: idx (B, T), attend (B, 1, 1, T) or None."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, idx: Tensor, attend: Tensor | None) -> Tensor:
        x = self.gpt.embed(idx)
        for block in self.gpt.blocks:
            x = block(x, attend)
        out: Tensor = self.gpt.transformer["ln_f"](x)
        return out


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """idx (B, T), and what may be attended to; None where there is no padding."""
    lengths = torch.tensor([len(row) for row in rows])
    idx = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    if int(lengths.min()) == idx.shape[1]:
        return idx, None
    return idx, (torch.arange(idx.shape[1]) < lengths[:, None])[:, None, None, :]


def unpad(states: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    return [state[: len(row)] for state, row in zip(states, rows, strict=True)]
