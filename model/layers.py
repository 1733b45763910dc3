"""The parts of a block: LoRALinear, LayerNorm, rotary positions, attention, MLP.

Trainable and padded: this is the reference that the serving forward is tested against.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import LORA_SITES, GPTConfig

LN_EPS = 1e-5
ROPE_BASE = 10000.0
SHORT_ROW = 256  # tokens


class LoRALinear(nn.Module):
    """B(A(drop(x))) * alpha / r, or 0.0 where disabled, so that call sites just add it (guide, 1).

    At n_embd 384 and rank 8 the four sites of a layer are 49,152 parameters:
    8 * (384 + 1152) + 8 * (384 + 384) + 8 * (384 + 1536) + 8 * (1536 + 384).
    """

    def __init__(
        self,
        in_f: int,
        out_f: int,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        enabled: bool = False,
    ) -> None:
        super().__init__()
        self.enabled = bool(enabled and r > 0)
        if not self.enabled:
            self.register_buffer("_dummy", torch.tensor(0.0), persistent=False)
            return
        self.r = r
        self.scaling = float(alpha) / float(r)
        self.A = nn.Linear(in_f, r, bias=False)
        self.B = nn.Linear(r, out_f, bias=False)
        self.drop = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor | float:
        if not self.enabled:
            return 0.0
        delta: Tensor = self.B(self.A(self.drop(x))) * self.scaling
        return delta


def lora_site(config: GPTConfig, site: str, enabled: bool) -> LoRALinear:
    """The config's LoRALinear for one site of LORA_SITES."""
    width_in, width_out = LORA_SITES[site]
    return LoRALinear(
        width_in * config.n_embd,
        width_out * config.n_embd,
        r=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        enabled=enabled,
    )


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, which nn.LayerNorm of old torch could not leave out."""

    bias: nn.Parameter | None

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, LN_EPS)


def rotary_table(block_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, (block_size, head_dim) each, float32.

    Half-split: angle i serves the components i and i + head_dim / 2 (RoFormer, section 3.4.2,
    with the pairing of GPT-NeoX).
    """
    rates = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(block_size, dtype=torch.float32), rates)  # (T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, D)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., D) turned by the angles of cos and sin, which broadcast against it."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q, k, v (B, H, T, D) -> (B, H, T, D).

    Short bfloat16 rows on a CPU are written out: torch's fused kernel takes four times as long for
    them (64 rows of 64 tokens, 6 heads, forward and backward: 36 ms against 8 ms).
    """
    short = q.shape[-2] <= SHORT_ROW
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and short and dropout == 0.0:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, T, T)
        if attend is not None:
            scores = scores.masked_fill(~attend, -torch.inf)
        y: Tensor = scores.softmax(-1) @ v
        return y
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)


class BidirectionalSelfAttention(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.head_dim = config.n_head, config.n_embd, config.head_dim
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.lora_qkv = lora_site(config, "attn.lora_qkv", config.use_lora_attn)
        self.lora_out = lora_site(config, "attn.lora_out", config.use_lora_attn)
        self.resid_dropout = nn.Dropout(config.dropout)
        cos, sin = rotary_table(config.block_size, config.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        """x (B, T, C); attend (B, 1, 1, T), True where a token may be attended to, or None."""
        rows, length, _ = x.shape
        qkv = self.c_attn(x) + self.lora_qkv(x)  # (B, T, 3C)
        q, k, v = (
            part.view(rows, length, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
            for part in qkv.split(self.n_embd, dim=2)
        )
        cos, sin = self.cos[:length].to(q.dtype), self.sin[:length].to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        y = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attend, dropout)
        y = y.transpose(1, 2).reshape(rows, length, self.n_embd)
        y = self.c_proj(y) + self.lora_out(y)
        out: Tensor = self.resid_dropout(y)
        return out


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.lora_fc = lora_site(config, "mlp.lora_fc", config.use_lora_mlp)
        self.lora_proj = lora_site(config, "mlp.lora_proj", config.use_lora_mlp)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C)"""
        x = self.gelu(self.c_fc(x) + self.lora_fc(x))  # (B, T, 4C)
        x = self.c_proj(x) + self.lora_proj(x)
        out: Tensor = self.dropout(x)
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = BidirectionalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out
