"""Calibration of a critic: the share of wrong tokens by bucket of its sigmoid.

The method is that of the training code: mask held-out text, fill the masks by sampling from the
model's own predictions, ask the critic about every token, and count how often it was wrong.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.encoder import FINAL, Encoder
from model.heads import CALIBRATION_BUCKETS, critic_logits
from model.lora import AdapterWeights, LoraBatch
from model.packed import PackedBatch

LOGITS = 1 << 24  # of masked positions that are held at a time: 64 MiB


def bucket_table(wrong: Tensor, p: Tensor) -> tuple[Tensor, int]:
    """The table (100,) float32 of tokens that are wrong or not (N,), and how many buckets had some.

    p (N,) is the critic's sigmoid. An empty bucket takes the value of the nearest filled one
    towards 0.5, or of the nearest on its other side where none is there. Raises ValueError for no
    tokens at all.
    """
    place = (p * CALIBRATION_BUCKETS).long().clamp(0, CALIBRATION_BUCKETS - 1)
    count = torch.bincount(place, minlength=CALIBRATION_BUCKETS)
    hits = torch.bincount(place, weights=wrong.double(), minlength=CALIBRATION_BUCKETS)
    filled = count.nonzero().squeeze(-1).tolist()
    if not filled:
        raise ValueError("there are no tokens to count")
    values = [float(hits[b] / count[b]) for b in (_source(b, filled) for b in range(len(count)))]
    return torch.tensor(values, dtype=torch.float32), len(filled)


def _source(bucket: int, filled: Sequence[int]) -> int:
    """The bucket whose share this one takes: itself where it has any tokens."""
    above = [other for other in filled if other >= bucket]
    below = [other for other in filled if other <= bucket]
    if bucket < CALIBRATION_BUCKETS // 2:
        return above[0] if above else below[-1]
    return below[-1] if below else above[0]


@dataclass(frozen=True)
class Judged:
    """What the critic said of filled rows: of N tokens, wrong or not, and its sigmoid."""

    wrong: Tensor  # (N,) bool
    p: Tensor  # (N,) float32


class CriticSample:
    """A critic and the model that fills the masks: a trunk under an adapter, as it is served."""

    def __init__(
        self,
        encoder: Encoder,
        weights: AdapterWeights | None,
        critic: Tensor,
        mask_shares: tuple[float, float],
        seed: int,
    ) -> None:
        """critic (C,) float32. Each row's share of masked tokens is drawn from `mask_shares`.

        Raises ValueError for a trunk without a mask token.
        """
        if encoder.config.mask_token_id is None:
            raise ValueError("the trunk has no mask_token_id: there is nothing to fill")
        self.encoder, self.weights, self.critic = encoder, weights, critic
        self.mask_token_id = encoder.config.mask_token_id
        self.mask_shares = mask_shares
        self._dice = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def judge(self, rows: Sequence[Tensor]) -> Judged:
        """rows of ids (T,) -> what the critic says of them, filled, [PAD] left out.

        Raises ValueError for logits that are not finite.
        """
        lengths, ids = [len(row) for row in rows], torch.cat(list(rows))  # (N,)
        asked = self._choose(rows)  # (M,)
        masked = ids.index_fill(0, asked, self.mask_token_id)
        filled = ids.index_copy(0, asked, self._fill(self._states(masked, lengths)[asked]))
        keep = torch.ones_like(ids, dtype=torch.bool)
        if self.encoder.config.pad_token_id is not None:
            keep = ids != self.encoder.config.pad_token_id
        logits = critic_logits(self._states(filled, lengths), self.critic)
        if not torch.isfinite(logits).all():
            raise ValueError(f"the critic's logits are not finite in {self.encoder.dtype}")
        return Judged((filled != ids)[keep], logits.sigmoid()[keep])

    def _states(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """(N, C) after ln_f"""
        lora = LoraBatch.of_rows(lengths, [self.weights] * len(lengths))
        return self.encoder.forward(PackedBatch(ids, lengths), lora)[FINAL]

    def _choose(self, rows: Sequence[Tensor]) -> Tensor:
        """Positions to mask in the rows end to end: of each its own share, one at least.

        Special tokens are left as they are; a row of nothing else has no position.
        """
        chosen, start = [], 0
        least, most = self.mask_shares
        for row in rows:
            places = (~self._special(row)).nonzero().squeeze(-1)
            share = least + (most - least) * float(torch.rand((), generator=self._dice))
            count = min(len(places), max(1, round(share * len(places))))
            order = torch.randperm(len(places), generator=self._dice)
            chosen.append(start + places[order[:count]].sort().values)
            start += len(row)
        return torch.cat(chosen)

    def _special(self, ids: Tensor) -> Tensor:
        config = self.encoder.config
        special = (config.mask_token_id, config.pad_token_id, config.cls_token_id)
        return torch.isin(ids, torch.tensor([token for token in special if token is not None]))

    def _fill(self, states: Tensor) -> Tensor:
        """(M, C) -> (M,) ids sampled from the predictions there."""
        if not len(states):
            return torch.empty(0, dtype=torch.int64)
        drawn = [
            torch.multinomial(
                (part.float() @ self.encoder.wte.t()).softmax(-1), 1, generator=self._dice
            ).squeeze(-1)
            for part in torch.split(states, max(1, LOGITS // self.encoder.config.vocab_size))
        ]
        return torch.cat(drawn)


def in_batches(rows: Sequence[Tensor], batch_tokens: int) -> Iterator[list[Tensor]]:
    """The rows in order, in lists of at most `batch_tokens` tokens or of one row."""
    batch: list[Tensor] = []
    tokens = 0
    for row in rows:
        if batch and tokens + len(row) > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += len(row)
    if batch:
        yield batch
