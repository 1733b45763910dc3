"""The probe: a forward that proves that an adapter changes something, and stays finite."""

from functools import cached_property

import torch
from torch import Tensor

from adapters.errors import Invalid
from adapters.format import AdapterSet
from adapters.weights import weights_of
from model.encoder import FINAL, Encoder
from model.heads import TrunkHeads, critic_logits
from model.lora import AdapterWeights, LoraBatch, SequenceHead
from model.packed import PackedBatch

PROBE_TOKENS = 32


class Probe:
    """A fixed sequence, and what the backbone alone makes of it."""

    def __init__(self, encoder: Encoder, heads: TrunkHeads) -> None:
        """`heads` are the backbone's own, on the encoder's device."""
        self.encoder, self.heads = encoder, heads

    @torch.inference_mode()
    def delta(self, adapter: AdapterSet) -> float:
        """How much the adapter moves the final states of the sequence, in the serving dtype.

        The norm of the change over the norm of the backbone's states; a critic head adds the
        change of its logits in the same way. A CLS embedding and a sequence head show only in a
        row that begins with [CLS]: for an adapter that has one of them, the states and the score
        of such a row are added too. A classifier alone moves nothing. Raises Invalid where what
        comes out is not finite.
        """
        encoder = self.encoder
        weights = weights_of(
            adapter,
            encoder.config,
            encoder.dtype,
            lambda t, d: t.to(encoder.device, d).contiguous(),
        )
        changed = self._states(weights)
        delta = _relative(changed - self._base, self._base)
        if weights.critic is not None:
            delta += self._delta_of_critic(changed, weights.critic)
        if weights.cls_embedding is not None or weights.sequence_head is not None:
            delta += self._delta_of_cls(weights)
        if not torch.isfinite(torch.tensor(delta)) or not torch.isfinite(changed).all():
            raise Invalid("not_finite", f"a probe forward is not finite as {encoder.dtype}")
        return delta

    def _delta_of_critic(self, states: Tensor, own: Tensor) -> float:
        """The change of the logits (N,) of states (N, C), computed from the heads' difference.

        The difference of a copy is 0, that of its logits may be a rounding error.
        """
        reference = torch.zeros_like(own) if self.heads.critic is None else self.heads.critic
        change = critic_logits(states, own - reference)
        return _relative(change, critic_logits(states, reference))

    def _delta_of_cls(self, weights: AdapterWeights) -> float:
        """The change of a row that begins with [CLS]: of its states, and of its sequence score.

        0 for a trunk without a cls_token_id, where no row can begin with it.
        """
        if self.encoder.config.cls_token_id is None:
            return 0.0
        changed = self._states(weights, led_by_cls=True)
        delta = _relative(changed - self._base_of_cls, self._base_of_cls)
        if weights.sequence_head is not None:
            delta += self._delta_of_sequence(changed[0], weights.sequence_head)
        return delta

    def _delta_of_sequence(self, first: Tensor, head: SequenceHead) -> float:
        """The change of the logit of a first token's state (C,), in units of the trunk's or of 1.

        Computed from the heads' difference, as that of the critic is.
        """
        own, reference = head.a * head.weight, torch.zeros_like(head.weight)
        shift, unit = head.b, 1.0
        if self.heads.sequence is not None:
            trunk = self.heads.sequence
            reference, shift = trunk.a * trunk.weight, head.b - trunk.b
            unit = max(unit, float((first @ reference + trunk.b).abs()))
        return float((first @ (own - reference) + shift).abs()) / unit

    @cached_property
    def _base(self) -> Tensor:
        """Of an adapter that replaces nothing: so that one of no effect gives the same bits."""
        return self._states(AdapterWeights())

    @cached_property
    def _base_of_cls(self) -> Tensor:
        return self._states(AdapterWeights(), led_by_cls=True)

    def _states(self, weights: AdapterWeights, led_by_cls: bool = False) -> Tensor:
        """(PROBE_TOKENS, C) float32"""
        config = self.encoder.config
        length = min(PROBE_TOKENS, config.block_size)
        ids = (torch.arange(length) * 7919 + 1) % config.vocab_size
        if led_by_cls:
            assert config.cls_token_id is not None
            ids[0] = config.cls_token_id
        batch = PackedBatch(ids.to(self.encoder.device), [length])
        lora = LoraBatch.of_rows(batch.lengths, [weights])
        return self.encoder.forward(batch, lora)[FINAL].float()


def _relative(change: Tensor, base: Tensor) -> float:
    return float(change.norm() / base.norm().clamp(min=1e-12))
