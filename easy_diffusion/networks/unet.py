"""UNet: the network that predicts eps, x0 or v from a noisy image, its timestep and a context.

Each level holds residual blocks, with attention where wanted. Between two levels, Downsample halves
the image and Upsample doubles it. A residual block on the way up also receives an output of the
same size from the way down, concatenated along the channels (Ronneberger et al., "U-Net", 2015; Ho
et al., "Denoising Diffusion Probabilistic Models", 2020, appendix B). The context enters by
cross-attention (Rombach et al., "Latent Diffusion", 2022, section 3.3).

    x_t [B, in_channels, H, W]                            output [B, out_channels, H, W]
      │ patches, conv_in                                    ▲ conv_out, pixels
    level 0  ─────────────── skip connections ──────────▶ level 0
      │ Downsample                                          ▲ Upsample
    level 1  ─────────────── skip connections ──────────▶ level 1
      │ Downsample                                          ▲ Upsample
      …                                                     …
    coarsest level  ──────── skip connections ──────────▶ coarsest level
      │                                                     ▲
      └──────────────────────── middle ─────────────────────┘

The layers stand in stages. A stage is a residual block and, where wanted, a transformer; on the way
down it ends in an output that is stored, on the way up it begins with one that was stored. A level
stores blocks + 1 outputs: those of its own stages, and before them what entered the level, the
output of conv_in or of Downsample. So the way up has blocks + 1 stages a level. Downsample is a
stage of its own, because its output is stored, too. Upsample takes no stored output, so it is the
last layer of the stage before it. The middle is a stage that neither stores nor receives.

For channels=(64, 128) and blocks=2, the outputs in the order in which they are stored, with their
channels. The way up receives them in the reverse order:

    stored, from left to right         received, from right to left
    conv_in 64, stage 64, stage 64     level 0, the last three stages of the way up
    Downsample 64, stage 128, 128      level 1, the first three; then Upsample

With patch = p, each p×p square of pixels becomes one position with p² times the channels, so that a
64×64 image with p = 4 costs what a 16×16 image does (Hoogeboom et al., "Simple diffusion", 2023).
`UNet.stable_diffusion_15()` is the network of Stable Diffusion 1.5.

`FastUNet` in fast_unet.py gives the same outputs faster when the context stays the same over many
calls, as in sampling.

The file needs torch, safetensors and, beside it, attention_kernels.py, blocks.py,
stable_diffusion_weights.py and weights_io.py.

>>> network = UNet(channels=(64, 128), context_dim=128)
>>> x_t = torch.randn(2, 3, 32, 32)
>>> context, mask = torch.randn(2, 5, 128), torch.ones(2, 5, dtype=torch.bool)
>>> network(x_t, torch.tensor([10, 500]), context, mask).shape
torch.Size([2, 3, 32, 32])
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .blocks import (
    Downsample,
    ResidualBlock,
    SpatialTransformer,
    Upsample,
    timestep_embedding,
    zero_init,
)
from .stable_diffusion_weights import load_stable_diffusion


class UNet(nn.Module):
    """(x_t [B, in_channels, H, W], t [B], context [B, L, D], mask) → [B, out_channels, H, W].

    t holds timesteps on the scale 0 … 1000 (fractions allowed), not 0 … 1. The context holds the
    token embeddings of a text encoder; mask is bool [B, L], True = a real token, with at least one
    True in each row, since a softmax over no keys is NaN; even an empty caption has its start
    token. A class label is a context of a single token, [B, 1, D]: a row of an nn.Embedding. A
    context [1, L, D] serves all images.

    out_channels: the channels of the image, or twice as many: the first half the prediction, the
        second half the values from which the variance is interpolated (Nichol & Dhariwal,
        "Improved Denoising Diffusion Probabilistic Models", 2021).
    channels: number of channels of each level, from the finest to the coarsest; multiples of 32,
        because the group normalisations have 32 groups; better 64 or more, see ResidualBlock.
    context_dim: D; None for a network without a context.
    blocks: residual blocks a level on the way down; the way up has blocks + 1, as said above.
    attention: for each level, whether its stages attend (default: all do); the middle always does.
    heads: number of attention heads.
    patch: side in pixels of the squares that become one position.
    pooled: whether a linear projection of the mean over the real tokens is also added to the time
        embedding, so that what the caption says of the whole image reaches every residual block
        directly.
    checkpointing: whether to keep only the input of each stage for the gradient and compute the
        stage again in the backward pass: a third more work, a fraction of the memory (Chen et al.,
        "Training Deep Nets with Sublinear Memory Cost", 2016).

    `forward` also takes `residuals`, the outputs of a ControlNet (controlnet.py): one for each
    stored output, which it is added to, and one for the output of the middle.

    The attribute `settings` is the dict of all these arguments: `UNet(**settings)` builds the
    network again, and `check_settings` of weights_io.py compares it with that of saved weights.
    `forward` raises ValueError unless height and width are multiples of patch · 2^(levels - 1).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        channels=(64, 128, 256),
        context_dim: int | None = None,
        blocks: int = 2,
        attention=None,
        heads: int = 4,
        patch: int = 1,
        pooled: bool = False,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        attention = tuple(attention) if attention is not None else (True,) * len(channels)
        if any(c % 32 for c in channels):
            raise ValueError(f"channels must be multiples of 32, not {tuple(channels)}")
        if len(attention) != len(channels):
            raise ValueError(
                f"attention needs one entry a level: {len(channels)}, not {len(attention)}"
            )
        if pooled and context_dim is None:
            raise ValueError(
                "pooled=True needs a context: give a context_dim, or pooled=False without captions"
            )
        # Saved with the weights and read by weights_io.py
        self.settings = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            channels=tuple(channels),
            context_dim=context_dim,
            blocks=blocks,
            attention=attention,
            heads=heads,
            patch=patch,
            pooled=pooled,
            dropout=dropout,
            checkpointing=checkpointing,
        )
        # Read by stable_diffusion_weights.py
        self.channels = tuple(channels)
        self.context_dim = context_dim
        self.blocks = blocks
        self.attention = attention
        self.heads = heads
        # Read by forward, beside channels and context_dim
        self.patch = patch
        self.checkpointing = checkpointing

        # Time embedding, and the pooled context that is added to it
        time_dim = 4 * channels[0]
        self.time = nn.Sequential(
            nn.Linear(channels[0], time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.pool = nn.Linear(context_dim, time_dim) if pooled else None

        def make_stage(c_in, c_out, attends):
            stage = nn.ModuleList([ResidualBlock(c_in, c_out, time_dim, dropout)])
            if attends:
                stage.append(SpatialTransformer(c_out, context_dim, heads))
            return stage

        # Way down; skip_channels are the channels of each output that the way up will receive
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        c = channels[0]
        skip_channels = [c]
        for level, level_channels in enumerate(channels):
            for _ in range(blocks):
                self.down.append(make_stage(c, level_channels, attention[level]))
                c = level_channels
                skip_channels.append(c)
            if level < len(channels) - 1:
                self.down.append(nn.ModuleList([Downsample(c)]))
                skip_channels.append(c)

        self.stored_channels = tuple(skip_channels)  # read by controlnet.py

        self.middle = make_stage(c, c, attends=True)
        self.middle.append(ResidualBlock(c, c, time_dim, dropout))

        # Way up: one stage for each stored output
        self.up = nn.ModuleList()
        for level, level_channels in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                c_in = c + skip_channels.pop()
                self.up.append(make_stage(c_in, level_channels, attention[level]))
                c = level_channels
            if level > 0:
                self.up[-1].append(Upsample(c))
        self.norm_out = nn.GroupNorm(32, c, eps=1e-5)
        self.conv_out = zero_init(nn.Conv2d(c, out_channels * patch**2, 3, padding=1))

    def forward(self, x, t, context=None, mask=None, residuals=None):
        self.check_context(context, mask, len(x))
        self.check_size(x)
        dtype = self.conv_in.weight.dtype  # a network in half precision takes images of any dtype
        x = x.to(dtype)
        if context is not None:
            context = context.to(dtype)

        time_embedding = self.embed_time(t, context, mask)  # [B, 4·channels[0]]

        # Way down, middle, way up
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))  # [B, channels[0], H/p, W/p]
        skips = [h]
        for stage in self.down:
            h = self.run_stage(stage, h, time_embedding, context, mask)
            skips.append(h)
        h = self.run_stage(self.middle, h, time_embedding, context, mask)
        if residuals is not None:  # of a ControlNet
            skips = [skip + residual for skip, residual in zip(skips, residuals)]
            h = h + residuals[-1]
        for stage in self.up:
            h = torch.cat([h, skips.pop()], dim=1)  # [B, channels of both, height, width]
            h = self.run_stage(stage, h, time_embedding, context, mask)
        h = self.conv_out(F.silu(self.norm_out(h)))  # [B, out_channels·p², H/p, W/p]
        return F.pixel_shuffle(h, self.patch)  # [B, out_channels, H, W]

    def embed_time(self, t, context=None, mask=None):
        """The time embedding, plus the projected mean of the context if `pooled`: [B, 4·C_0].

        C_0 are the channels of the finest level. context: in the dtype of the weights.
        """
        embedding = timestep_embedding(t, self.channels[0])
        embedding = self.time(embedding.to(self.conv_in.weight.dtype))
        if self.pool is not None:
            embedding = embedding + self.pool(masked_mean(context, mask))
        return embedding

    def check_context(self, context, mask, batch: int) -> None:
        """Raise ValueError for a missing context, a wrong number of captions, or an empty one.

        Whether a row of the mask has no True is checked on the CPU only, and not under
        torch.compile: on a GPU the check would be a synchronization.
        """
        if context is None and self.context_dim is not None:
            raise ValueError("a network with a context_dim needs a context [B, L, D], not None")
        if context is not None and len(context) not in (1, batch):
            raise ValueError(
                f"a context of {len(context)} captions does not fit {batch} images: "
                f"it needs 1 caption or {batch}"
            )

        on_cpu = mask is not None and mask.device.type == "cpu"
        if on_cpu and not torch.compiler.is_compiling() and not mask.any(dim=-1).all():
            rows = (~mask.any(dim=-1)).nonzero().squeeze(1).tolist()
            raise ValueError(
                f"the mask has no True in the rows {rows}: a caption has at least one token that "
                "may be attended to, if only a start token"
            )

    def check_size(self, x) -> None:
        """Raise ValueError for a height or width that is not a multiple of `size_multiple`."""
        if x.shape[-2] % self.size_multiple or x.shape[-1] % self.size_multiple:
            raise ValueError(
                f"height and width must be multiples of {self.size_multiple} for this network, "
                f"not {tuple(x.shape[-2:])}"
            )

    @property
    def size_multiple(self) -> int:
        """Height and width of the images must be multiples of this."""
        halvings = sum(isinstance(stage[0], Downsample) for stage in self.down)
        return self.patch * 2**halvings

    def run_stage(self, stage, h, time_embedding, context, mask):
        """`apply_stage`, with checkpointing where that is on and gradients are enabled."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(
                apply_stage, stage, h, time_embedding, context, mask, use_reentrant=False
            )
        return apply_stage(stage, h, time_embedding, context, mask)

    @classmethod
    def stable_diffusion_15(cls, in_channels: int = 4, **options) -> "UNet":
        """The UNet of Stable Diffusion 1.5, 860 M weights; context [B, 77, 768].

        in_channels: 4 for latents; 9 for the inpainting model, whose input is
            [latent, mask, latent of the masked image].
        """
        return cls(
            in_channels,
            4,
            (320, 640, 1280, 1280),
            context_dim=768,
            attention=(True, True, True, False),
            heads=8,
            **options,
        )

    @classmethod
    def easy_diffusion_2023(cls, learned_variance: bool = False, **options) -> "UNet":
        """The UNet of this project's first version, 93 M weights (371 MB); context [B, 52, 768].

        For images 3×128×128. It attends where the image is 32, 16 and 8 wide, and in the middle.

        learned_variance: whether the output has twice the channels, to predict also the variance.
        """
        return cls(
            3,
            3 * (1 + learned_variance),
            (128, 128, 128, 256, 256, 512, 512),
            context_dim=768,
            blocks=1,
            attention=(False, False, True, True, True, False, False),
            **options,
        )

    def load_stable_diffusion(self, path) -> "UNet":
        """Load weights from `path`, see stable_diffusion_weights.py; return the network itself."""
        load_stable_diffusion(self, path)
        return self


def apply_stage(stage, h, time_embedding, context, mask):
    """Apply the layers of a stage to h, each with the arguments that it takes.

    h: [B, channels, height, width] as they are at this stage.
    """
    for layer in stage:
        if isinstance(layer, ResidualBlock):
            h = layer(h, time_embedding)
        elif isinstance(layer, SpatialTransformer):
            h = layer(h, context, mask)
        else:
            h = layer(h)
    return h


def masked_mean(context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the real tokens of a context [B, L, D] with mask bool [B, L] → [B, D].

    Each row of the mask has at least one True.
    """
    if mask is None:
        return context.mean(dim=1)
    weight = mask[..., None].to(context.dtype)  # [B, L, 1]
    return (context * weight).sum(dim=1) / weight.sum(dim=1)
