"""GPT: the guide's trainable model. In float32 it is the reference for every fast path; it is
never served."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import LORA_SITES, MAIN_MATRICES, GPTConfig
from model.generate import unmask
from model.heads import SEQUENCE_HEAD
from model.layers import Block, LayerNorm, LoRALinear

COMPILED_PREFIX = "_orig_mod."
HEADS = ("critic_head", "sequence_head", "cls_embedding")  # what freeze_base may leave to train
_HEAD_TENSORS = {"critic_head.weight", "cls_embedding", *SEQUENCE_HEAD}
# Training-only tensors: guidance, unused without it, and a temperature that nothing reads.
_UNUSED = re.compile(r"(^|\.)(cross|ln_cross|plan_encoder)\.|^sequence_head\.temperature$")


def plain_name(name: str) -> str:
    """The name without what torch.compile and DistributedDataParallel put before it, in any order.

    A block that was compiled by itself has `_orig_mod.` inside the name; it is removed there too.
    """
    while name.startswith((COMPILED_PREFIX, "module.")):
        name = name.partition(".")[2]
    return name.replace(f".{COMPILED_PREFIX}", ".")


def clean_training_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict under its plain names, and the names of the unused tensors dropped from it.

    Raises ValueError where two tensors have the same plain name.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if plain_name(name) in plain:
            raise ValueError(f"two tensors are named {plain_name(name)} without their prefixes")
        plain[plain_name(name)] = tensor
    dropped = sorted(name for name in plain if _UNUSED.search(name))
    return {name: plain[name] for name in plain if name not in dropped}, dropped


class ScaledSigmoidHead(nn.Module):
    """sigmoid(A * Wx + B): one score in 0..1 for a sequence, from its first token."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.base_predictor = nn.Linear(n_embd, 1, bias=False)
        self.A = nn.Parameter(torch.ones(1))
        self.B = nn.Parameter(torch.zeros(1))

    def logits(self, x: Tensor) -> Tensor:
        """x (B, C) -> (B,), before the sigmoid: for losses."""
        raw: Tensor = self.base_predictor(x).squeeze(-1)
        return self.A * raw + self.B

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C) -> (B,)"""
        return torch.sigmoid(self.logits(x))


class GPT(nn.Module):
    """Bidirectional transformer whose four big matrices may be shared by all layers.

    With `share_main_matrices` the Parameters of block 0's c_attn, c_proj, c_fc and c_proj are
    aliased into every block (guide, 4); LayerNorms and LoRA stay each block's own. A model with a
    `cls_token_id` also has a CLS embedding, in place of that token's row of wte, and a sequence
    head. Checkpoints of the training code load as they are: compile prefixes and unused guidance
    tensors are taken off on the way in.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        if config.cls_token_id is not None:
            self.cls_embedding = nn.Parameter(torch.empty(config.n_embd).normal_(std=0.02))
            self.sequence_head = ScaledSigmoidHead(config.n_embd)
        if config.add_critic_head:
            self.critic_head = nn.Linear(config.n_embd, 1, bias=False)
        self._init_weights()
        if config.share_main_matrices:
            self._share_main_matrices()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """nn.Module's, but for the training code's prefixes and unused tensors, taken off first."""
        cleaned, _ = clean_training_state(state_dict)
        return super().load_state_dict(cleaned, strict, assign)

    @property
    def wte(self) -> nn.Embedding:
        embedding = self.transformer["wte"]
        assert isinstance(embedding, nn.Embedding)
        return embedding

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.transformer["h"].children() if isinstance(block, Block)]

    def _init_weights(self) -> None:
        """Normal(0.02), residual projections scaled by depth (GPT-2); LoRA keeps its own init.

        LoRA's matrices are nn.Linears too: a model-wide init that took them along would make
        B != 0, and a fresh adapter would no longer be no change at all.
        """
        lora = {id(p) for m in self.modules() if isinstance(m, LoRALinear) for p in m.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in lora or parameter.dim() < 2:
                if name.endswith(".bias"):
                    nn.init.zeros_(parameter)
                continue
            depth = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
            nn.init.normal_(parameter, std=0.02 * depth)

    def _share_main_matrices(self) -> None:
        first, *others = self.blocks
        for path in MAIN_MATRICES:
            shared = first.get_submodule(path)
            for block in others:
                linear = block.get_submodule(path)
                linear.weight, linear.bias = shared.weight, shared.bias

    def _build_default_attention_mask(self, idx: Tensor) -> Tensor:
        """(B, T) -> (B, T) of 1 = keep and 0 = padding. [MASK] tokens are kept: they are read.

        Training needs this for padded batches. The server pads nothing and masks nothing: there
        [PAD] is a token like any other, as it is here with an attention mask of ones.
        """
        if self.config.pad_token_id is None:
            return torch.ones_like(idx)
        return (idx != self.config.pad_token_id).to(idx.dtype)

    def embed(self, idx: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)"""
        x: Tensor = self.wte(idx)
        if self.config.cls_token_id is None:
            return x
        is_cls = (idx == self.config.cls_token_id).unsqueeze(-1)
        return torch.where(is_cls, self.cls_embedding.to(x.dtype), x)

    def hidden_states(self, idx: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """The (B, T, C) state after each block, then after ln_f: n_layer + 1 tensors.

        attention_mask (B, T), 1 = keep, 0 = padding; by default only pad_token_id is padding.
        Raises ValueError for more than block_size tokens.
        """
        if idx.shape[1] > self.config.block_size:
            raise ValueError(
                f"{idx.shape[1]} tokens are more than block_size {self.config.block_size}"
            )
        if attention_mask is None:
            attention_mask = self._build_default_attention_mask(idx)
        attend = attention_mask.bool()[:, None, None, :]  # SDPA's True = may be attended to
        x = self.transformer["drop"](self.embed(idx))
        states = []
        for block in self.blocks:
            x = block(x, attend)
            states.append(x)
        return [*states, self.transformer["ln_f"](x)]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T) ids -> logits (B, T, V) of every position, and the loss where targets are given.

        targets (B, T) hold the true id where idx was masked, ignore_index elsewhere. With a critic
        head the loss is cross-entropy + critic_alpha * critic_loss.
        """
        logits: Tensor = self.lm_head(self.hidden_states(idx, attention_mask)[-1])
        if targets is None:
            return logits, None
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=self.config.ignore_index
        )
        if self.config.add_critic_head and self.config.critic_alpha > 0:
            critic = self.critic_loss(idx, targets, logits.detach(), attention_mask)
            loss = loss + self.config.critic_alpha * critic
        return logits, loss

    def critic_loss(
        self, idx: Tensor, targets: Tensor, logits: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Binary cross-entropy of the critic on tokens sampled from the model's own predictions.

        Masked positions are filled by sampling `logits` (B, T, V); a token's target is 1 where it
        differs from the true one. Padding does not count.
        """
        if attention_mask is None:
            attention_mask = self._build_default_attention_mask(idx)
        asked = targets != self.config.ignore_index
        truth = torch.where(asked, targets, idx)
        filled = truth.clone()
        if asked.any():
            filled[asked] = torch.multinomial(logits[asked].float().softmax(-1), 1).squeeze(-1)
        scores = self.critic_scores(filled, attention_mask).float()
        losses = F.binary_cross_entropy_with_logits(
            scores, (filled != truth).float(), reduction="none"
        )
        keep = attention_mask.to(losses.dtype)
        return (losses * keep).sum() / keep.sum().clamp(min=1)

    def critic_scores(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T) critic logits: the higher, the likelier the token is wrong.

        Raises ValueError for a model without a critic head.
        """
        if not self.config.add_critic_head:
            raise ValueError("this model has no critic head: set add_critic_head")
        scores: Tensor = self.critic_head(self.hidden_states(idx, attention_mask)[-1])
        return scores.squeeze(-1)

    def sequence_scores(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) ids, each row led by [CLS] -> (B,) scores in 0..1 from the first token.

        Raises ValueError for a model without a CLS token.
        """
        if self.config.cls_token_id is None:
            raise ValueError("this model has no sequence head: set cls_token_id")
        scores: Tensor = self.sequence_head(self.hidden_states(idx, attention_mask)[-1][:, 0])
        return scores

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T + max_new_tokens): [MASK]s appended, then unmasked over `steps`.

        After each step but the last the tokens that the critic finds likeliest wrong (without a
        critic: those sampled with the least probability) are masked again, ever fewer of them.
        `steps` defaults to one for every new token, 16 at most. What does not fit in block_size is
        made in spans of half a block, each seeing the text just before it.
        """
        while max_new_tokens > 0:
            room = self.config.block_size - idx.shape[1]
            count = min(max_new_tokens, max(room, self.config.block_size // 2, 1))
            context = idx[:, max(0, count - room) :]
            new = unmask(self, context, count, temperature, top_k, steps or min(count, 16))
            idx = torch.cat((idx, new), dim=1)
            max_new_tokens -= count
        return idx

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
        device_type: str = "cpu",
    ) -> torch.optim.AdamW:
        """AdamW over what is trainable, each shared parameter once; only dim >= 2 decays."""
        trainable = [p for p in self.parameters() if p.requires_grad]  # parameters() has no twins
        groups = [
            {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=learning_rate, betas=betas, fused=device_type == "cuda" or None
        )

    def freeze_base(self, heads: Collection[str] = ()) -> None:
        """Train LoRA and LayerNorms alone, and of HEADS those named in `heads`.

        Raises AttributeError for a head that this model does not have.
        """
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, (LoRALinear, LayerNorm)):
                module.requires_grad_(True)
        for name in heads:
            getattr(self, name).requires_grad_(True)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """What an adapter file may carry: LoRA, LayerNorms, heads and the CLS embedding."""
        return {
            name: tensor.detach().clone()
            for name, tensor in self.state_dict().items()
            if is_adapter_tensor(name)
        }

    def load_adapter_state_dict(
        self, state: Mapping[str, Tensor], lora_alpha: float, use_rslora: bool = False
    ) -> None:
        """Put on an adapter set: its own rank at each site, no LoRA where it has none.

        LayerNorms, heads and CLS embedding that it carries replace the model's; others stay as
        they are.
        Scaling is alpha / r, with rsLoRA alpha / sqrt(r). Raises ValueError, with nothing changed,
        for a tensor that has no place in this model.
        """
        self._check_adapter_names(state)
        for layer, block in enumerate(self.blocks):
            for site in LORA_SITES:
                path = f"transformer.h.{layer}.{site}"
                a, b = state.get(f"{path}.A.weight"), state.get(f"{path}.B.weight")
                parent, leaf = site.split(".")
                lora = (
                    LoRALinear(1, 1)
                    if a is None or b is None
                    else _loaded(a, b, lora_alpha, use_rslora)
                )
                setattr(block.get_submodule(parent), leaf, lora)
        rest = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
        self.load_state_dict(rest, strict=False)

    def _check_adapter_names(self, state: Mapping[str, Tensor]) -> None:
        paths = [
            f"transformer.h.{layer}.{site}"
            for layer in range(self.config.n_layer)
            for site in LORA_SITES
        ]
        for path in paths:
            if (f"{path}.A.weight" in state) != (f"{path}.B.weight" in state):
                raise ValueError(f"{path} has only one of A and B")
        missing = [name for name in SEQUENCE_HEAD if name not in state]
        if 0 < len(missing) < len(SEQUENCE_HEAD):
            raise ValueError(f"the sequence head comes without its {missing[0]}")
        lora = {f"{path}.{matrix}.weight" for path in paths for matrix in "AB"}
        others = {n for n in self.state_dict() if is_adapter_tensor(n) and ".lora_" not in n}
        strange = sorted(name for name in state if name not in lora | others)
        if strange:
            raise ValueError(f"not adapter tensors of this model: {', '.join(strange[:3])}")


def is_adapter_tensor(name: str) -> bool:
    """Whether a state-dict name belongs to LoRA, a LayerNorm, a head or the CLS embedding."""
    return ".lora_" in name or ".ln_" in name or name in _HEAD_TENSORS


def _loaded(a: Tensor, b: Tensor, alpha: float, use_rslora: bool) -> LoRALinear:
    rank = a.shape[0]
    lora = LoRALinear(a.shape[1], b.shape[0], r=rank, alpha=alpha, enabled=True)
    if use_rslora:
        lora.scaling = alpha / rank**0.5
    lora.load_state_dict({"A.weight": a, "B.weight": b})
    return lora
