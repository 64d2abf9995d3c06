"""Building blocks of a diffusion UNet: residual block, attention, resampling and time embedding.

    residual block   x + conv(silu(norm(conv(silu(norm(x))) + time)))     He et al. 2016; Ho et al.
                                                                          2020, appendix B
    attention        softmax(Q Kᵀ / sqrt(d)) V                            Vaswani et al. 2017, eq. 1
    GEGLU            gelu(x W) ⊙ (x V), then a linear layer               Shazeer, "GLU Variants
                                                                          Improve Transformer", 2020
    time embedding   [cos(t ω_i), sin(t ω_i)], i = 0, …, dim/2 - 1,       Vaswani et al. 2017,
                     ω_i = 10000^(-i / (dim/2))                           section 3.5

In self-attention the positions of the image attend to each other. In cross-attention they attend to
the context: the queries come from the image, the keys and values from the token embeddings of the
caption. The last layers of ResidualBlock and of SpatialTransformer are initialised to zero, so that
a new one adds zero to its shortcut (Dhariwal & Nichol 2021; Bachlechner et al. 2020).

Shapes: B images, C channels, H·W positions, L tokens of dimension D, N queries, d = C / heads
channels of each head; in the table, dim is the dimension of the time embedding and ⊙ the
elementwise product. The file needs torch and, beside it, attention_kernels.py.

>>> x = torch.randn(2, 64, 8, 8)
>>> time_embedding = torch.randn(2, 256)
>>> context = torch.randn(2, 5, 128)
>>> x = ResidualBlock(64, 96, time_dim=256)(x, time_embedding)
>>> tuple(SpatialTransformer(96, context_dim=128)(x, context).shape)
(2, 96, 8, 8)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention_kernels import attend


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding of timesteps t [B] → float32 [B, dim]: all cosines, then all sines.

    t: timesteps on the scale 0 … 1000 (fractions allowed), not 0 … 1.
    The dim/2 frequencies fall geometrically from 1 to 1/10000 (exclusive); dim is even.
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies  # [B, dim/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, dim]


def zero_init(layer: nn.Module) -> nn.Module:
    """Set all parameters of a layer to zero and return the layer."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with a skip connection: [B, C_in, H, W] → [B, C_out, H, W].

    time_dim: dimension of the time embedding, which is projected and added between the
        convolutions; None for a block without time, as in an autoencoder.
    groups, eps: of the group normalisations; both channel counts must be multiples of `groups`,
        and with a time embedding, out_channels should be 2 · groups or more, see norm2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int | None,
        dropout: float = 0.0,
        groups: int = 32,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        # Projection of the time embedding to one value a channel
        self.time = nn.Linear(time_dim, out_channels) if time_dim is not None else None
        # norm2 subtracts the mean of each group. In a group of a single channel that removes what
        # the time embedding added, so 32 groups should have 64 channels or more.
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.shortcut = nn.Identity()

    def forward(self, x, time_embedding=None):
        h = self.conv1(F.silu(self.norm1(x)))  # [B, C_out, H, W]
        if self.time is not None:
            h = h + self.time(F.silu(time_embedding))[:, :, None, None]  # [B, C_out, H, W]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # [B, C_out, H, W]
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] to a context [B, L, D], or to x itself: → [B, N, C].

    dim: C, a multiple of the number of heads, else ValueError.
    context_dim: D; None for self-attention.
    bias: whether the projections to queries, keys and values have a bias.

    `forward` takes a context [B, L, D], or [1, L, D] for all images, and a mask bool [B, L] or
    [1, L], True = a token that may be attended to, with at least one True in each row, since a
    softmax over no keys is NaN; even an empty caption has its start token.
    """

    def __init__(
        self, dim: int, context_dim: int | None = None, heads: int = 4, bias: bool = False
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q = self.split_heads(self.to_q(x))  # [B, heads, N, d]
        k = self.split_heads(self.to_k(context))  # [B, heads, L, d]
        v = self.split_heads(self.to_v(context))  # [B, heads, L, d]
        # softmax(Q Kᵀ / sqrt(d)) V, the same numbers as plain_attention of attention_kernels.py
        out = attend(q, k, v, mask)  # [B, heads, N, d]
        return self.to_out(out.transpose(1, 2).flatten(2))  # [B, N, C]

    def split_heads(self, y):
        """[B, N, C] → [B, heads, N, d], d = C / heads."""
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """GEGLU, gelu(x W) ⊙ (x V), and a linear layer: [B, N, C] → [B, N, C].

    W computes the gate and V the value; ⊙ is the elementwise product.
    expansion: W and V have expansion · C outputs each.
    """

    def __init__(self, dim: int, expansion: int = 4):
        super().__init__()
        # V and W in one layer: its outputs are first the value, then the gate
        self.into = nn.Linear(dim, dim * expansion * 2)
        self.out = nn.Linear(dim * expansion, dim)

    def forward(self, x):
        value, gate = self.into(x).chunk(2, dim=-1)  # [B, N, expansion · C] each
        return self.out(value * F.gelu(gate))  # [B, N, C]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward: [B, N, C] → [B, N, C].

    Without a context_dim there is no cross-attention.
    """

    def __init__(self, dim: int, context_dim: int | None = None, heads: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, heads=heads)
        self.has_cross_attention = context_dim is not None
        if self.has_cross_attention:
            self.norm2 = nn.LayerNorm(dim)
            self.cross_attention = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim)

    def forward(self, x, context=None, mask=None):
        x = x + self.self_attention(self.norm1(x))
        if self.has_cross_attention:
            x = x + self.cross_attention(self.norm2(x), context, mask)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the H·W positions of a feature map: [B, C, H, W] → [B, C, H, W]."""

    def __init__(
        self, channels: int, context_dim: int | None = None, heads: int = 4, groups: int = 32
    ):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.block = TransformerBlock(channels, context_dim, heads)
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x, context=None, mask=None):
        h = self.proj_in(self.norm(x))  # [B, C, H, W]
        positions = h.flatten(2).transpose(1, 2)  # [B, H·W, C]
        positions = self.block(positions, context, mask)  # [B, H·W, C]
        h = positions.transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution: [B, C, H, W] → [B, C, H/2, W/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Double height and width by nearest-neighbour interpolation and a convolution.

    [B, C, H, W] → [B, C, 2H, 2W].
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
