"""Masked-token prediction, and a critic of what the model itself would fill in."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batches import Batch, Batches, Example
from model.corpus import Row, tokens_of
from model.gpt import GPT
from model.metrics import area_under_roc
from model.objective import Loss, Objective
from model.tokenizer import Tokenizer

MASKED_STEP = 64


class Masked(Objective):
    """Masked-token prediction, and a critic of tokens sampled from the predictions.

    A row's share of masked tokens is drawn uniformly from `mask_shares`, as in masked diffusion
    (LLaDA, section 2.1, whose range is 0 to 1). From `critic_start` of the training on the critic's
    loss is added, its weight rising to critic_alpha over CRITIC_WARMUP of the training. With a CLS
    token every second batch is led by it, and the sequence head and the CLS embedding learn the
    share of right tokens, with or without a critic beside them.
    """

    fields = ("text",)
    CRITIC_WARMUP = 0.1

    def __init__(
        self,
        gpt: GPT,
        mask_shares: tuple[float, float] = (0.1, 0.6),
        critic_start: float = 0.5,
        teacher_weight: float = 0.0,
    ) -> None:
        super().__init__(gpt)
        if gpt.config.mask_token_id is None:
            raise ValueError("masked training needs a mask_token_id")
        self.mask_token_id = gpt.config.mask_token_id
        self.mask_shares, self.critic_start = mask_shares, critic_start
        self.teacher_weight = teacher_weight
        self.has_critic = gpt.config.add_critic_head
        self.has_cls = gpt.config.cls_token_id is not None
        if gpt.config.critic_alpha > 0:
            self.heads = ("critic_head",) * self.has_critic
            self.heads += ("sequence_head", "cls_embedding") * self.has_cls

    def example(self, row: Row, names: Sequence[str], tokenizer: Tokenizer) -> Example:
        room = self.gpt.config.block_size - self.has_cls
        return Example((tokens_of(row, names[0], tokenizer, room).ids,))

    def critic_weight(self, share: float) -> float:
        if not (self.has_critic or self.has_cls):
            return 0.0
        rise = (share - self.critic_start) / self.CRITIC_WARMUP
        return self.gpt.config.critic_alpha * min(1.0, max(0.0, rise))

    def loss(self, batch: Batch, share: float) -> Loss:
        ids = batch.ids if torch.rand(()) < 0.5 else self._led_by_cls(batch.ids)
        asked = self._choose(ids)  # (M,)
        hidden, logits = self._predict(ids, asked)
        loss = F.cross_entropy(logits, ids.flatten()[asked])
        parts = {"masked": loss}
        if self.teacher_weight:
            parts["teacher"] = self._teacher_loss(hidden, ids, batch)
            loss = loss + self.teacher_weight * parts["teacher"]
        if weight := self.critic_weight(share):
            filled = self._fill(ids, asked, logits.detach())
            losses = self._critic_losses(ids, filled)
            parts |= losses
            loss = loss + weight * sum(losses.values(), loss.new_zeros(()))
        return loss, {name: part.item() for name, part in parts.items()}

    def _teacher_loss(self, hidden: Tensor, ids: Tensor, batch: Batch) -> Tensor:
        """1 - cosine of the pooled rows, as far as they are seen, and the teacher's vectors."""
        vectors = torch.stack([e.target for e in batch.examples if isinstance(e.target, Tensor)])
        return (1 - F.cosine_similarity(self.pool(hidden, ids), vectors)).mean()

    def measure(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Masked-token loss and accuracy, and the critic's AUC over the tokens of filled rows."""
        losses, hits, wrong, scores = self._sample(batches)
        measures = {
            "masked_loss": losses.mean().item(),
            "masked_accuracy": hits.double().mean().item(),
        }
        if self.has_critic:
            measures["critic_auc"] = area_under_roc(wrong, scores)
        return measures

    @torch.no_grad()
    def critic_sample(
        self, examples: Sequence[Example], batch_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """The critic on held-out rows filled by the model: (N,) wrong or not, (N,) probability."""
        self.eval()
        torch.manual_seed(0)
        batches = Batches(examples, batch_tokens, 0).in_order(self.gpt.config)
        _, _, wrong, scores = self._sample(batches)
        return wrong, scores.sigmoid()

    def _sample(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss and hit of each masked token (M,); wrong or not and critic logit of each, (N,)."""
        parts = []
        for batch in batches:
            asked = self._choose(batch.ids)
            (_, logits), truth = self._predict(batch.ids, asked), batch.ids.flatten()[asked]
            losses = F.cross_entropy(logits, truth, reduction="none")
            filled, keep = self._fill(batch.ids, asked, logits), batch.ids != self.pad_token_id
            wrong = (filled != batch.ids)[keep]
            scores = self.gpt.critic_scores(filled)[keep] if self.has_critic else wrong
            parts.append((losses, logits.argmax(-1) == truth, wrong, scores.float()))
        losses, hits, wrong, scores = (torch.cat(column) for column in zip(*parts, strict=True))
        return losses, hits, wrong, scores

    def _led_by_cls(self, ids: Tensor) -> Tensor:
        cls_token_id = self.gpt.config.cls_token_id
        if cls_token_id is None:
            return ids
        return F.pad(ids, (1, 0), value=cls_token_id)[:, : self.gpt.config.block_size]

    def _choose(self, ids: Tensor) -> Tensor:
        """Positions to mask, in the flattened (R, T): each row's own share, one at least a row.

        Of more than MASKED_STEP a few are left out: kernels are compiled for each count.
        """
        least, most = self.mask_shares
        share = least + (most - least) * torch.rand(len(ids), 1)
        dice = torch.rand(ids.shape)
        special = (ids == self.pad_token_id) | (ids == self.mask_token_id)
        if self.gpt.config.cls_token_id is not None:
            special |= ids == self.gpt.config.cls_token_id
        dice = dice.masked_fill(special, 2.0)
        chosen = (dice < share) | (dice == dice.min(1, keepdim=True).values) & ~special
        places = chosen.flatten().nonzero().squeeze(-1)
        count = len(places) - len(places) % MASKED_STEP or len(places)
        return places[torch.randperm(len(places))[:count]].sort().values

    def _predict(self, ids: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The states (R, T, C) when `asked` is masked, and logits (M, V) float32 of `asked`."""
        masked = ids.flatten().index_fill(0, asked, self.mask_token_id).view_as(ids)
        hidden = self.hidden(masked)
        logits: Tensor = self.gpt.lm_head(hidden.flatten(0, 1).index_select(0, asked))
        return hidden, logits.float()

    def _fill(self, ids: Tensor, asked: Tensor, logits: Tensor) -> Tensor:
        """ids with the asked positions sampled from the logits, by inverting their distribution."""
        cumulated = logits.softmax(-1).cumsum(-1)  # (M, V)
        point = torch.rand(len(asked), 1) * cumulated[:, -1:]
        drawn = torch.searchsorted(cumulated, point).squeeze(-1).clamp(max=logits.shape[-1] - 1)
        return ids.flatten().index_copy(0, asked, drawn).view_as(ids)

    def _critic_losses(self, ids: Tensor, filled: Tensor) -> dict[str, Tensor]:
        """`critic` of the tokens and, where a [CLS] leads, `sequence` of the rows.

        Both are binary cross-entropies. `critic` is GPT.critic_loss, whose target is 1 for a wrong
        token; the target of `sequence` is the share of right tokens, the [CLS] among them.
        """
        led = int(ids[0, 0]) == self.gpt.config.cls_token_id
        if not (self.has_critic or led):
            return {}
        hidden, keep = self.hidden(filled), ids != self.pad_token_id
        wrong = (filled != ids).float()
        losses = {}
        if self.has_critic:
            scores = self.gpt.critic_head(hidden).squeeze(-1).float()
            losses["critic"] = F.binary_cross_entropy_with_logits(scores[keep], wrong[keep])
        if led:
            losses["sequence"] = self._sequence_loss(hidden, wrong, keep)
        return losses

    def _sequence_loss(self, hidden: Tensor, wrong: Tensor, keep: Tensor) -> Tensor:
        """hidden (R, T, C) of rows led by [CLS]; wrong and keep (R, T)."""
        right = 1 - (wrong * keep).sum(1) / keep.sum(1)
        logits = self.gpt.sequence_head.logits(hidden[:, 0])
        return F.binary_cross_entropy_with_logits(logits.float(), right)
