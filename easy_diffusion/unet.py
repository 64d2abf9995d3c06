"""The network: a UNet that looks at a noisy picture, the time and the caption's words.

Going down, each level holds residual blocks (with attention) and halves the picture; going up, it doubles, and every block
gets beside its input what the block of the same size saw on the way down (Ronneberger et al. 2015; Ho et al. 2020,
appendix B). The words enter by cross-attention (Rombach et al., "Latent Diffusion", 2022, section 3.3).

    x [B, C, H, W] ─ patches ─ conv ─ level 0 ─ level 1 ─ ... ─ middle ─ ... ─ level 1 ─ level 0 ─ conv ─ patches ─▶ [B, C', H, W]

With patch = p each square of p×p pixels becomes one place with p² as many channels, so that a 64×64 picture costs what a
16×16 one does (Hoogeboom et al., "Simple diffusion", 2023). The file needs torch and blocks.py beside it.

>>> network = UNet(channels=(32, 64), context_dim=128)
>>> words, mask = torch.randn(2, 5, 128), torch.ones(2, 5, dtype=torch.bool)
>>> network(torch.randn(2, 3, 32, 32), torch.tensor([10, 500]), words, mask).shape
torch.Size([2, 3, 32, 32])
"""

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import Downsample, ResidualBlock, SpatialTransformer, Upsample, timestep_embedding, zeroed


class UNet(nn.Module):
    """(x_t [B, in_channels, H, W], t [B], context [B, L, D], mask bool [B, L]) → [B, out_channels, H, W].

    channels: one number a level, each a multiple of 32 (group normalisation). blocks: residual blocks a level on the way
    down; one more on the way up. attention: for each level, whether its blocks attend (default: all do).
    context_dim: D; None for a network without words. pooled: the mean of the words also joins the time, a short way for what
    holds everywhere in the picture. Height and width are multiples of patch · 2^(levels - 1), else ValueError.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 3, channels=(64, 128, 256), context_dim: int | None = None,
                 blocks: int = 2, attention=None, heads: int = 4, patch: int = 1, pooled: bool = False, dropout: float = 0.0):
        super().__init__()
        if any(c % 32 for c in channels):
            raise ValueError(f"channels are multiples of 32, not {tuple(channels)}")
        attention = tuple(attention) if attention is not None else (True,) * len(channels)
        if len(attention) != len(channels):
            raise ValueError(f"attention has one entry a level: {len(channels)}, not {len(attention)}")
        self.patch, self.time_channels, self.reads_words = patch, channels[0], context_dim is not None
        time_dim = 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.pool = nn.Linear(context_dim, time_dim) if pooled else None

        def block(c_in, c_out, attends):
            parts = [ResidualBlock(c_in, c_out, time_dim, dropout)]
            return nn.ModuleList(parts + ([SpatialTransformer(c_out, context_dim, heads)] if attends else []))

        self.conv_in = nn.Conv2d(in_channels * patch ** 2, channels[0], 3, padding=1)
        self.down, skips, c = nn.ModuleList(), [channels[0]], channels[0]
        for level, width in enumerate(channels):
            for _ in range(blocks):
                self.down.append(block(c, width, attention[level]))
                skips.append(c := width)
            if level < len(channels) - 1:
                self.down.append(nn.ModuleList([Downsample(c)]))
                skips.append(c)
        self.middle = nn.ModuleList([*block(c, c, True), ResidualBlock(c, c, time_dim, dropout)])
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            for i in range(blocks + 1):
                self.up.append(block(c + skips.pop(), width, attention[level]))
                c = width
                if level > 0 and i == blocks:
                    self.up[-1].append(Upsample(c))
        self.norm_out = nn.GroupNorm(32, c, eps=1e-5)
        self.conv_out = zeroed(nn.Conv2d(c, out_channels * patch ** 2, 3, padding=1))

    def forward(self, x, t, context=None, mask=None):
        if context is None and self.reads_words:
            raise ValueError("this network reads words: it needs a context [B, L, D]")
        multiple = self.patch * 2 ** sum(isinstance(part[0], Downsample) for part in self.down)
        if x.shape[-2] % multiple or x.shape[-1] % multiple:
            raise ValueError(f"height and width are multiples of {multiple} for this network, not {tuple(x.shape[-2:])}")
        time = self.time(timestep_embedding(t, self.time_channels).to(self.conv_in.weight.dtype))   # [B, 4 C]
        if self.pool is not None:
            time = time + self.pool(masked_mean(context, mask))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))                  # [B, C, H/p, W/p]
        skips = [h]
        for parts in self.down:
            h = run(parts, h, time, context, mask)
            skips.append(h)
        h = run(self.middle, h, time, context, mask)
        for parts in self.up:
            h = run(parts, torch.cat([h, skips.pop()], dim=1), time, context, mask)
        h = self.conv_out(F.silu(self.norm_out(h)))                         # [B, C' p², H/p, W/p]
        return F.pixel_shuffle(h, self.patch)                               # [B, C', H, W]


def run(parts, h, time, context, mask):
    """One block of the UNet: each part with the arguments that it takes."""
    for part in parts:
        if isinstance(part, ResidualBlock):
            h = part(h, time)
        elif isinstance(part, SpatialTransformer):
            h = part(h, context, mask)
        else:
            h = part(h)
    return h


def masked_mean(context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the real words: [B, L, D], bool [B, L] → [B, D]."""
    if mask is None:
        return context.mean(dim=1)
    weight = mask[..., None].to(context.dtype)
    return (context * weight).sum(dim=1) / weight.sum(dim=1)
