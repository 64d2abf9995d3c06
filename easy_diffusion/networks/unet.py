"""The network: a UNet that looks at a noisy picture, the time and the caption's words.

Going down, each level holds residual blocks (with attention) and halves the picture; going up, it doubles, and every block
gets beside its input what the block of the same size saw on the way down (Ronneberger et al. 2015; Ho et al. 2020,
appendix B). The words enter by cross-attention (Rombach et al., "Latent Diffusion", 2022, section 3.3).

    x [B, C, H, W] ─ patches ─ conv ─ level 0 ─ level 1 ─ ... ─ middle ─ ... ─ level 1 ─ level 0 ─ conv ─ patches ─▶ [B, C', H, W]

With patch = p each square of p×p pixels becomes one place with p² as many channels, so that a 64×64 picture costs what a
16×16 one does (Hoogeboom et al., "Simple diffusion", 2023). With the numbers of `UNet.stable_diffusion_15()` it is
Stable Diffusion's. The file needs torch and blocks.py beside it; to load its weights, stable_diffusion.py and checkpoint.py, too.

>>> network = UNet(channels=(32, 64), context_dim=128)
>>> words, mask = torch.randn(2, 5, 128), torch.ones(2, 5, dtype=torch.bool)
>>> network(torch.randn(2, 3, 32, 32), torch.tensor([10, 500]), words, mask).shape
torch.Size([2, 3, 32, 32])
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as computed_again

from .blocks import Downsample, KeyValueCache, ResidualBlock, SpatialTransformer, Upsample, timestep_embedding, zero_init
from .stable_diffusion_weights import load_stable_diffusion


class UNet(nn.Module):
    """(x_t [B, in_channels, H, W], t [B], context [B, L, D], mask bool [B, L]) → [B, out_channels, H, W].

    Words are the states of a text encoder; a class is a single word, [B, 1, D], a row of an nn.Embedding.
    channels: one number a level, each a multiple of 32, since normalisation has 32 groups; and rather 64 or more: a group of one channel
    loses its mean, and with it the time that was added. blocks: residual blocks a level on the way down; one more on the way up.
    attention: for each level, whether its blocks attend (default: all do); the middle always does.
    context_dim: D; None for a network without words. pooled: the mean of the words also joins the time, a short way for what
    holds everywhere in the picture. checkpointing: blocks keep their input alone for the gradient and are computed again, a third more
    work for a fraction of the memory (Chen et al. 2016). Height and width are multiples of patch · 2^(levels - 1), else ValueError.
    A context of k B captions gives k B answers: the first B of them for the B pictures, the next B for the same pictures again, ...
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 3, channels=(64, 128, 256), context_dim: int | None = None,
                 blocks: int = 2, attention=None, heads: int = 4, patch: int = 1, pooled: bool = False, dropout: float = 0.0,
                 checkpointing: bool = False):
        super().__init__()
        if any(c % 32 for c in channels):
            raise ValueError(f"channels are multiples of 32, not {tuple(channels)}")
        attention = tuple(attention) if attention is not None else (True,) * len(channels)
        if len(attention) != len(channels):
            raise ValueError(f"attention has one entry a level: {len(channels)}, not {len(attention)}")
        if pooled and context_dim is None:
            raise ValueError("pooled=True needs words: give a context_dim")
        self.channels, self.blocks, self.attention, self.heads = tuple(channels), blocks, attention, heads
        self.context_dim, self.patch, self.checkpointing = context_dim, patch, checkpointing
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
        self.conv_out = zero_init(nn.Conv2d(c, out_channels * patch ** 2, 3, padding=1))

    @classmethod
    def stable_diffusion_15(cls, in_channels: int = 4, **more) -> "UNet":
        """Stable Diffusion 1.5's, of 860 M weights: latents of 4 channels, or with 9 its inpainting model's [latent, mask, latent of the
        masked picture]; context [B, 77, 768]."""
        return cls(in_channels, 4, (320, 640, 1280, 1280), context_dim=768, attention=(True, True, True, False), heads=8, **more)

    @classmethod
    def easy_diffusion_2023(cls, learned_variance: bool = False, **more) -> "UNet":
        """The network of this project's first version, of 93 M weights (371 MB): pictures 3×128×128, context [B, 52, 768] of cn_clip,
        attention where the picture is 32, 16 and 8 wide, and in the middle."""
        return cls(3, 3 * (1 + learned_variance), (128, 128, 128, 256, 256, 512, 512), context_dim=768, blocks=1,
                   attention=(False, False, True, True, True, False, False), **more)

    def load_stable_diffusion(self, path) -> "UNet":
        """Weights from a folder or file of diffusers or of the original; see stable_diffusion.py. Returns itself."""
        load_stable_diffusion(self, path)
        return self

    def cache_context(self, context: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[KeyValueCache, torch.Tensor | None]:
        """A context [B or 1, L, D] and its mask, to be passed to many calls: its keys and values are computed once, not at each step of
        sampling, and places where no caption has a word are left out."""
        if mask is not None:
            some = mask.any(dim=0)
            context, mask = context[:, some], mask[:, some]
        return KeyValueCache(context.to(self.conv_in.weight.dtype)), mask

    @property
    def size_multiple(self) -> int:
        """Height and width of its pictures are multiples of this."""
        return self.patch * 2 ** sum(isinstance(part[0], Downsample) for part in self.down)

    def forward(self, x, t, context=None, mask=None):
        if context is None and self.context_dim is not None:
            raise ValueError("this network reads words: it needs a context [B, L, D]")
        if context is not None and len(context) != 1 and len(context) % len(x):
            raise ValueError(f"{len(context)} captions cannot be shared out among {len(x)} pictures")
        if x.shape[-2] % self.size_multiple or x.shape[-1] % self.size_multiple:
            raise ValueError(f"height and width are multiples of {self.size_multiple} for this network, not {tuple(x.shape[-2:])}")
        dtype = self.conv_in.weight.dtype                                   # a network in half precision takes pictures in any
        x, context = x.to(dtype), context.to(dtype) if isinstance(context, torch.Tensor) else context
        time = self.time(timestep_embedding(t, self.channels[0]).to(dtype))                     # [B, 4 C]
        if self.pool is not None:
            states = context.states if isinstance(context, KeyValueCache) else context
            words = self.pool(masked_mean(states, mask))                    # [k B, 4 C] for k captions a picture, or [1, 4 C]
            time = repeat_batch(time, len(words)) + words
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))                  # [B, C, H/p, W/p]
        skips = [h]
        for parts in self.down:
            h = self.run_block(parts, h, time, context, mask)
            skips.append(h)
        h = self.run_block(self.middle, h, time, context, mask)
        for parts in self.up:
            skip = repeat_batch(skips.pop(), len(h))
            h = self.run_block(parts, torch.cat([h, skip], dim=1), time, context, mask)
        h = self.conv_out(F.silu(self.norm_out(h)))                         # [B, C' p², H/p, W/p]
        return F.pixel_shuffle(h, self.patch)                               # [B, C', H, W]

    def run_block(self, parts, h, time, context, mask):
        """One block; with checkpointing nothing inside is kept for the gradient, it is computed again when it is needed."""
        if self.checkpointing and torch.is_grad_enabled():
            return computed_again(apply_block, parts, h, time, context, mask, use_reentrant=False)
        return apply_block(parts, h, time, context, mask)


def apply_block(parts, h, time, context, mask):
    """One block of the UNet: each part with the arguments that it takes."""
    for part in parts:
        if isinstance(part, ResidualBlock):
            h = part(repeat_batch(h, len(time)), repeat_batch(time, len(h)))
        elif isinstance(part, SpatialTransformer):
            h = part(h if context is None else repeat_batch(h, len(context)), context, mask)
        else:
            h = part(h)
    return h


def repeat_batch(y: torch.Tensor, b: int) -> torch.Tensor:
    """y [B, ...] again and again until there are b of them; y itself if b is not more."""
    return y.repeat(b // len(y), *(1,) * (y.ndim - 1)) if b > len(y) else y


def masked_mean(context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the real words: [B, L, D], bool [B, L] → [B, D]."""
    if mask is None:
        return context.mean(dim=1)
    weight = mask[..., None].to(context.dtype)
    return (context * weight).sum(dim=1) / weight.sum(dim=1)
