"""The parts that a diffusion UNet is made of: residual block, attention, up, down, the embedding of time.

    residual block   x + conv(silu(norm(conv(silu(norm(x))) + time)))      He et al. 2016; Ho et al. 2020, appendix B
    attention        softmax(Q Kᵀ / sqrt(d)) V                              Vaswani et al. 2017, eq. 1
    GEGLU            (x W) · gelu(x V), then a linear layer                 Shazeer, "GLU Variants", 2020
    time             [cos(t ω_i), sin(t ω_i)], ω_i = 10000^(-i / (d/2))     Vaswani et al. 2017, section 3.5

In self-attention the picture's places look at each other; in cross-attention they look at the words: queries come
from the picture, keys and values from the caption. The last layer of each branch starts at zero, so that a new network
is the identity with some convolutions, and training begins gently (Dhariwal & Nichol 2021; Bachlechner et al. 2020).
Shapes: B pictures, C channels, H·W places, L words, D the words' dimension. The file needs nothing but torch.

>>> x, time, words = torch.randn(2, 64, 8, 8), torch.randn(2, 256), torch.randn(2, 5, 128)
>>> x = ResidualBlock(64, 96, time_dim=256)(x, time)
>>> tuple(SpatialTransformer(96, context_dim=128)(x, words).shape)
(2, 96, 8, 8)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """t [B] → [B, dim] float32, cosines then sines of dim/2 frequencies from 1 down to 1/10000 (exclusive)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies                               # [B, dim/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                  # [B, dim]


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer, its parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, the time added between them, and a way around: [B, C_in, H, W] → [B, C_out, H, W]. Where there is no
    time, as in an autoencoder, time_dim is None."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None, dropout: float = 0.0, groups: int = 32,
                 eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels) if time_dim is not None else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))                               # [B, C_out, H, W]
        if self.time is not None:
            h = h + self.time(F.silu(time))[:, :, None, None]               # [B, C_out, H, W]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))                 # [B, C_out, H, W]
        return self.shortcut(x) + h


class KeyValueCache:
    """States [B or 1, L, D] that stay the same over the steps of sampling: each attention that meets them computes its keys and values
    once; and anew when torch has counted a change of its weights since, and whenever gradients are wanted."""

    def __init__(self, states: torch.Tensor):
        self.states, self.known = states, {}

    def __len__(self) -> int:
        return len(self.states)

    @torch.compiler.disable
    def project_keys_values(self, attention, dtype):
        if torch.is_grad_enabled():
            return attention.project_keys_values(self.states)
        weights = (attention.to_k.weight, attention.to_v.weight)
        version = dtype, *((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
        if self.known.get(attention, (None,))[0] != version:
            self.known[attention] = version, attention.project_keys_values(self.states)
        return self.known[attention][1]


MAX_SCORES = 2 ** 23     # 16 MB in bf16: blocks above 32 MB come anew from the system, page by page, at a tenth of a training step


def attention_weights(q, k, mask=None):
    """softmax(Q Kᵀ / sqrt(d)), how much each place looks at each word: q [B, heads, N, d], k [B, heads, L, d], mask bool [B, 1, 1, L]
    → [B, heads, N, L]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                # [B, heads, N, L]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] to context [B, L, D], or to x itself if context_dim is None.

    mask is bool [B, L], True = a word that may be looked at. With few words softmax(QKᵀ)V, spelled out, is faster on a CPU than the fused
    kernel, the more so in training, since that kernel's backward pass is slow there; with many, and on a GPU, the fused one is.
    """

    def __init__(self, dim: int, context_dim: int | None = None, heads: int = 4, bias: bool = False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None):
        q = self._split(self.to_q(x))                                       # [B, heads, N, C/heads]
        if isinstance(context, KeyValueCache):
            k, v = context.project_keys_values(self, q.dtype)                   # [B, heads, L, C/heads] each
        else:
            k, v = self.project_keys_values(x if context is None else context)
        if mask is not None:
            mask = mask[:, None, None, :].expand(len(x), -1, -1, -1)        # [B, 1, 1, L], for all heads and places
        k, v = k.expand(len(x), -1, -1, -1), v.expand(len(x), -1, -1, -1)
        if x.device.type != "cpu" or k.shape[-2] > 512:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)   # [B, heads, N, C/heads]
        else:
            few = max(1, MAX_SCORES // (self.heads * q.shape[-2] * k.shape[-2]))
            parts = zip(*(y.split(few) if y is not None else [None] * len(x) for y in (q, k, v, mask)))
            out = torch.cat([attention_weights(q, k, m).to(v.dtype) @ v for q, k, v, m in parts])
        return self.to_out(out.transpose(1, 2).flatten(2))                  # [B, N, C]

    def project_keys_values(self, context):
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def _split(self, y):
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)            # [B, N, C] → [B, heads, N, C/heads]


class FeedForward(nn.Module):
    """GEGLU: twice four times as wide inside, one half gating the other; [B, N, C] → [B, N, C]."""

    def __init__(self, dim: int, expansion: int = 4):
        super().__init__()
        self.into = nn.Linear(dim, dim * expansion * 2)
        self.out = nn.Linear(dim * expansion, dim)

    def forward(self, x):
        value, gate = self.into(x).chunk(2, dim=-1)                         # [B, N, 4C] each
        return self.out(value * F.gelu(gate))                               # [B, N, C]


class TransformerBlock(nn.Module):
    """Look at each other, look at the words, think: [B, N, C] → [B, N, C]."""

    def __init__(self, dim: int, context_dim: int | None = None, heads: int = 4):
        super().__init__()
        self.norm1, self.self_attention = nn.LayerNorm(dim), Attention(dim, heads=heads)
        self.has_cross_attention = context_dim is not None
        if self.has_cross_attention:
            self.norm2, self.cross_attention = nn.LayerNorm(dim), Attention(dim, context_dim, heads)
        self.norm3, self.feed_forward = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x, context=None, mask=None):
        x = x + self.self_attention(self.norm1(x))
        if self.has_cross_attention:
            x = x + self.cross_attention(self.norm2(x), context, mask)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the places of a picture: [B, C, H, W] → [B, C, H, W]."""

    def __init__(self, channels: int, context_dim: int | None = None, heads: int = 4, groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.block = TransformerBlock(channels, context_dim, heads)
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x, context=None, mask=None):
        h = self.proj_in(self.norm(x))                                      # [B, C, H, W]
        places = h.flatten(2).transpose(1, 2)                               # [B, H·W, C]
        places = self.block(places, context, mask)                          # [B, H·W, C]
        h = places.transpose(1, 2).unflatten(2, x.shape[2:])                # [B, C, H, W]
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Half the height and width by a strided convolution: [B, C, H, W] → [B, C, H/2, W/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width, nearest neighbour and a convolution: [B, C, H, W] → [B, C, 2H, 2W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
