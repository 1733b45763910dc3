"""The probe: a forward that proves that an adapter changes something, and stays finite."""

from functools import cached_property

import torch
from torch import Tensor

from adapters.errors import Invalid
from adapters.format import AdapterSet
from adapters.weights import weights_of
from model.encoder import FINAL, Encoder
from model.heads import critic_logits
from model.lora import AdapterWeights, LoraBatch
from model.packed import PackedBatch

PROBE_TOKENS = 32


class Probe:
    """A fixed sequence, and what the backbone alone makes of it."""

    def __init__(self, encoder: Encoder, base_critic: Tensor | None) -> None:
        """base_critic (C,) float32, where the backbone has a critic of its own."""
        self.encoder, self.base_critic = encoder, base_critic

    @torch.inference_mode()
    def delta(self, adapter: AdapterSet) -> float:
        """How much the adapter moves the final states of the sequence, in the serving dtype.

        The norm of the change over the norm of the backbone's states; a critic head adds the
        change of its logits in the same way. A classifier alone moves nothing. Raises Invalid
        where what comes out is not finite.
        """
        encoder = self.encoder
        weights = weights_of(
            adapter,
            encoder.config,
            encoder.dtype,
            lambda t, d: t.to(encoder.device, d).contiguous(),
        )
        changed = self._states(weights)
        delta = _relative(self._base, changed)
        if weights.critic is not None:
            own = critic_logits(changed, weights.critic)
            reference = torch.zeros_like(own)
            if self.base_critic is not None:
                reference = critic_logits(changed, self.base_critic)
            delta += _relative(reference, own)
        if not torch.isfinite(torch.tensor(delta)) or not torch.isfinite(changed).all():
            raise Invalid("not_finite", f"a probe forward is not finite as {encoder.dtype}")
        return delta

    @cached_property
    def _base(self) -> Tensor:
        """Of an adapter that replaces nothing: so that one of no effect gives the same bits."""
        return self._states(AdapterWeights())

    def _states(self, weights: AdapterWeights) -> Tensor:
        """(PROBE_TOKENS, C) float32"""
        config = self.encoder.config
        length = min(PROBE_TOKENS, config.block_size)
        ids = (torch.arange(length) * 7919 + 1) % config.vocab_size
        batch = PackedBatch(ids.to(self.encoder.device), [length])
        lora = LoraBatch.of_rows(batch.lengths, [weights])
        return self.encoder.forward(batch, lora)[FINAL].float()


def _relative(base: Tensor, changed: Tensor) -> float:
    return float((changed - base).norm() / base.norm().clamp(min=1e-12))
