"""Iterative unmasking: how a bidirectional model writes text."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.gpt import GPT


def unmask(
    gpt: "GPT",
    context: Tensor,
    count: int,
    temperature: float,
    top_k: int | None,
    steps: int,
) -> Tensor:
    """(B, T) context -> (B, count) new tokens after it.

    Each step samples every [MASK], then masks again the doubtful among the new ones, by a cosine
    schedule from all to none (MaskGIT, section 3.2; the critic chooses as in Token-Critic).
    Raises ValueError without a mask_token_id, or for a temperature or top_k that is not positive.
    """
    mask_id = gpt.config.mask_token_id
    if mask_id is None:
        raise ValueError("generate needs a mask_token_id: this model writes by unmasking")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    rows = context.shape[0]
    idx = torch.cat((context, context.new_full((rows, count), mask_id)), dim=1)
    doubt = torch.zeros(idx.shape, device=idx.device)  # of every token: how likely wrong
    for step in range(1, steps + 1):
        masked = idx == mask_id
        masked[:, : context.shape[1]] = False  # a [MASK] of the prompt is the prompt's own
        idx, chance = _sample(gpt, idx, masked, temperature, top_k)
        again = int(count * math.cos(step / steps * math.pi / 2))
        if again == 0:
            break
        if gpt.config.add_critic_head:
            doubt = gpt.critic_scores(idx)
        else:
            doubt = torch.where(masked, -chance, doubt)
        worst = doubt[:, context.shape[1] :].topk(again, dim=1).indices + context.shape[1]
        idx = idx.scatter(1, worst, mask_id)
    return idx[:, context.shape[1] :]


def _sample(
    gpt: "GPT", idx: Tensor, masked: Tensor, temperature: float, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """idx with its masked positions sampled, and the probability of what was drawn, (B, T)."""
    logits = gpt(idx)[0].float() / temperature  # (B, T, V)
    for token in (gpt.config.mask_token_id, gpt.config.pad_token_id, gpt.config.cls_token_id):
        if token is not None:
            logits[..., token] = -torch.inf
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    chances = logits.softmax(-1)
    drawn = torch.multinomial(chances.flatten(0, 1), 1).view(idx.shape)
    chance = chances.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    return torch.where(masked, drawn, idx), chance
