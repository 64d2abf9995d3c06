"""Building blocks of a diffusion UNet: residual block, attention, resampling and time embedding.

    residual block   x + conv(silu(norm(conv(silu(norm(x))) + time)))     He et al. 2016; Ho et al.
                                                                          2020, appendix B
    attention        softmax(Q Kᵀ / sqrt(d)) V                            Vaswani et al. 2017, eq. 1
    GEGLU            (x W) · gelu(x V), then a linear layer               Shazeer, "GLU Variants
                                                                          Improve Transformer", 2020
    time embedding   [cos(t ω_i), sin(t ω_i)], ω_i = 10000^(-i / (d/2))   Vaswani et al. 2017,
                                                                          section 3.5

In self-attention the positions of the image attend to each other. In cross-attention they attend to
the context: the queries come from the image, the keys and values from the token embeddings of the
caption. The last layer of each branch is initialised to zero, so that a new block passes its input
on unchanged (Dhariwal & Nichol 2021; Bachlechner et al. 2020).

Shapes: B images, C channels, H·W positions, L tokens of dimension D, N queries, d channels of each
head. The file needs only torch.

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

# Largest number of keys for which a CPU uses `plain_attention` instead of the fused kernel.
MAX_PLAIN_KEYS = 512

# Largest number of scores that `plain_attention` computes at a time: 16 MB in bf16. A CPU process
# fetches memory blocks above 32 MB from the operating system anew each time, page by page, which
# took a tenth of a training step.
MAX_SCORES = 2**23


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding of timesteps t [B] → float32 [B, dim]: all cosines, then all sines.

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
    groups, eps: of the group normalisations; both channel counts must be multiples of `groups`.
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
        self.time = nn.Linear(time_dim, out_channels) if time_dim is not None else None
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


class KeyValueCache:
    """A context [B or 1, L, D] that stays the same over sampling steps, with its keys and values.

    It is passed to a network in place of the context. Each attention layer computes its keys and
    values once and finds them here at the following steps. They are computed again if the dtype or
    the layer's weights have changed, and always while gradients are enabled.
    """

    def __init__(self, context: torch.Tensor):
        self.context = context
        self.cached = {}  # attention layer → (version of its weights, (keys, values))

    def __len__(self) -> int:
        return len(self.context)

    @torch.compiler.disable
    def project_keys_values(self, attention, dtype):
        """Keys and values of the context for one attention layer, [B or 1, heads, L, d] each."""
        if torch.is_grad_enabled():
            return attention.project_keys_values(self.context)
        key_version = weight_version(attention.to_k.weight)
        value_version = weight_version(attention.to_v.weight)
        version = (dtype, key_version, value_version)
        cached_version, keys_values = self.cached.get(attention, (None, None))
        if cached_version != version:
            keys_values = attention.project_keys_values(self.context)
            self.cached[attention] = (version, keys_values)
        return keys_values


def weight_version(weight: torch.Tensor) -> tuple[int, int]:
    """A pair that changes when the weight moves in memory or is modified in place."""
    in_place_changes = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), in_place_changes


def attention_weights(q, k, mask=None):
    """softmax(Q Kᵀ / sqrt(d)): how much each query attends to each key; the rows sum to 1.

    q [B, heads, N, d], k [B, heads, L, d], mask bool [B, 1, 1, L] → [B, heads, N, L].
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, N, L]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


def plain_attention(q, k, v, mask=None):
    """softmax(Q Kᵀ / sqrt(d)) V, for as many images at a time as MAX_SCORES allows.

    q [B, heads, N, d], k and v [B, heads, L, d], mask bool [B, 1, 1, L] → [B, heads, N, d].
    """
    scores_per_image = q.shape[1] * q.shape[2] * k.shape[2]  # heads · N · L
    chunk = max(1, MAX_SCORES // scores_per_image)  # images at a time
    masks = mask.split(chunk) if mask is not None else [None] * len(q)
    outputs = []
    for q_i, k_i, v_i, mask_i in zip(q.split(chunk), k.split(chunk), v.split(chunk), masks):
        weights = attention_weights(q_i, k_i, mask_i)  # [chunk, heads, N, L]
        outputs.append(weights.to(v.dtype) @ v_i)  # [chunk, heads, N, d]
    return torch.cat(outputs)


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] to a context [B, L, D], or to x itself: → [B, N, C].

    dim: C, a multiple of the number of heads, else ValueError.
    context_dim: D; None for self-attention.
    bias: whether the projections to queries, keys and values have a bias.

    `forward` takes mask bool [B, L], True = a token that may be attended to. On a CPU and with few
    keys, softmax(QKᵀ)V written out is faster than PyTorch's fused kernel, above all in training,
    because that kernel's backward pass is slow there. Otherwise the fused kernel is faster.
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
        # Queries, keys and values
        q = self.split_heads(self.to_q(x))  # [B, heads, N, d]
        if isinstance(context, KeyValueCache):
            k, v = context.project_keys_values(self, q.dtype)  # [B or 1, heads, L, d] each
        else:
            k, v = self.project_keys_values(x if context is None else context)

        # One context serves all images of the batch; one mask serves all heads and queries
        k = k.expand(len(x), -1, -1, -1)  # [B, heads, L, d]
        v = v.expand(len(x), -1, -1, -1)  # [B, heads, L, d]
        if mask is not None:
            mask = mask[:, None, None, :].expand(len(x), -1, -1, -1)  # [B, 1, 1, L]

        # softmax(Q Kᵀ / sqrt(d)) V
        if x.device.type == "cpu" and k.shape[-2] <= MAX_PLAIN_KEYS:
            out = plain_attention(q, k, v, mask)  # [B, heads, N, d]
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, heads, N, d]
        return self.to_out(out.transpose(1, 2).flatten(2))  # [B, N, C]

    def project_keys_values(self, context):
        """Keys and values of a context [B, L, D], [B, heads, L, d] each."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def split_heads(self, y):
        """[B, N, C] → [B, heads, N, d], d = C / heads."""
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """GEGLU, (x W) · gelu(x V), and a linear layer: [B, N, C] → [B, N, C].

    W and V are the two halves of `into`; each has expansion · C outputs.
    """

    def __init__(self, dim: int, expansion: int = 4):
        super().__init__()
        self.into = nn.Linear(dim, dim * expansion * 2)
        self.out = nn.Linear(dim * expansion, dim)

    def forward(self, x):
        value, gate = self.into(x).chunk(2, dim=-1)  # [B, N, 4C] each
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
