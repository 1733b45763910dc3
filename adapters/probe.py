"""The probe: a forward that proves that an adapter changes something, and stays finite."""

import torch
from torch import Tensor

from adapters.errors import Invalid
from adapters.format import AdapterSet
from adapters.weights import weights_of
from model.encoder import FINAL, Encoder
from model.heads import critic_logits
from model.lora import LoraBatch
from model.packed import PackedBatch

PROBE_TOKENS = 32


@torch.inference_mode()
def probe_delta(encoder: Encoder, adapter: AdapterSet, base_critic: Tensor | None) -> float:
    """How much the adapter moves the final states of a fixed sequence, in the serving dtype.

    The norm of the change over the norm of the backbone's states; a critic head adds the change of
    its logits in the same way. A classifier alone moves nothing. Raises Invalid where what comes
    out is not finite.
    """
    config = encoder.config
    length = min(PROBE_TOKENS, config.block_size)
    ids = (torch.arange(length) * 7919 + 1) % config.vocab_size
    batch = PackedBatch(torch.cat((ids, ids)).to(encoder.device), [length, length])
    weights = weights_of(
        adapter, config, encoder.dtype, lambda t, d: t.to(encoder.device, d).contiguous()
    )
    lora = LoraBatch.of_rows(batch.lengths, [None, weights])
    states = encoder.forward(batch, lora)[FINAL].float()
    base, changed = states[:length], states[length:]
    delta = _relative(base, changed)
    if weights.critic is not None:
        own = critic_logits(changed, weights.critic)
        reference = torch.zeros_like(own)
        if base_critic is not None:
            reference = critic_logits(changed, base_critic)
        delta += _relative(reference, own)
    if not torch.isfinite(torch.tensor(delta)) or not torch.isfinite(changed).all():
        raise Invalid("not_finite", f"a probe forward is not finite as {encoder.dtype}")
    return delta


def _relative(base: Tensor, changed: Tensor) -> float:
    return float((changed - base).norm() / base.norm().clamp(min=1e-12))
