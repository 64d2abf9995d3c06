"""Motion modules: frames attend to each other, and an image network becomes one of films.

A UNet of images treats the frames of a film as a batch, and knows nothing of their order. A motion
module follows each of its stages. There the F frames attend to each other, at each position of the
image alone (Guo et al., "AnimateDiff: Animate Your Personalized Text-to-Image Diffusion Models
without Specific Tuning", 2023, section 4.2):

    h [B·F, C, H, W]  →  B·H·W sequences of F vectors  →  attention, feed-forward  →  h + zero(...)

Its last layer begins at zero, so that an untrained VideoUNet gives, frame by frame, exactly what
the image network gives. How a frame knows its place f in the film is one of

    "sinusoidal"   the embedding of f is added before the attention (Vaswani et al. 2017, section
                   3.5). The first and the last frame are far from each other.
    "circular"     queries and keys are rotated (Su et al., "RoFormer", 2021, eq. 13) by the angles
                   2π k f / F with whole numbers k. So q_f·k_g depends on (f - g) mod F alone: frame
                   0 follows the last one, and rolling the noise along time rolls the film. So no
                   cut between two frames differs from any other.

Films are [B, C, F, H, W]. The schedule, losses and samplers do not care about the form, so that
they work for films as they are.

The file needs torch, safetensors and, beside it, attention_kernels.py, blocks.py, unet.py,
stable_diffusion_weights.py and weights_io.py.

>>> unet = UNet(channels=(64, 128), context_dim=16)
>>> video = VideoUNet.from_unet(unet)
>>> film, t, context = torch.randn(2, 3, 8, 16, 16), torch.tensor([10, 500]), torch.randn(2, 5, 16)
>>> out = video(film, t, context)
>>> tuple(out.shape), torch.allclose(out[:, :, 3], unet(film[:, :, 3], t, context), atol=1e-5)
((2, 3, 8, 16, 16), True)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention_kernels import attend
from .blocks import Attention, Downsample, FeedForward, Upsample, timestep_embedding, zero_init
from .unet import UNet

POSITIONS = ("circular", "sinusoidal")
FREQUENCIES = 5         # of circular positions: 0 to 4 turns in a film, all there are of 8 frames


class FrameAttention(Attention):
    """Self-attention of F frames, [N, F, C] → [N, F, C], with positions of one of POSITIONS."""

    def __init__(self, dim: int, heads: int, positions: str):
        super().__init__(dim, heads=heads)
        if positions not in POSITIONS:
            raise ValueError(f"positions are one of {', '.join(POSITIONS)}, not {positions!r}")
        if positions == "circular" and dim // heads % 2:
            raise ValueError(f"circular positions need an even number of channels a head, not "
                             f"{dim // heads}")
        self.positions = positions

    def forward(self, x):
        frames = x.shape[1]
        if self.positions == "sinusoidal":
            x = x + embed_frames(frames, x.shape[2], x.device).to(x.dtype)
        q, k, v = (self.split_heads(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        if self.positions == "circular":
            angles = circular_angles(frames, q.shape[-1] // 2, x.device)   # [F, d/2]
            q, k = rotate(q, angles), rotate(k, angles)                         # [N, heads, F, d]
        out = attend(q, k, v, None)
        return self.to_out(out.transpose(1, 2).flatten(2))


def circular_angles(frames: int, pairs: int, device=None) -> torch.Tensor:
    """Angles 2π k_i f / F for frame f and pair of channels i, float32 [F, pairs].

    k_i runs through the whole numbers below FREQUENCIES again and again, whatever F is, so that
    trained weights mean the same in films of another length.
    """
    f = torch.arange(frames, device=device)
    k = torch.arange(pairs, device=device) % FREQUENCIES
    turns = f[:, None] * k % frames                 # whole numbers, so that F and 0 are equal
    return 2 * math.pi * turns.float() / frames


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of x [..., F, d] by angles [F, d/2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def embed_frames(frames: int, dim: int, device=None) -> torch.Tensor:
    """Sinusoidal embedding of the frames 0 … F - 1, float32 [F, dim]: sin, cos, sin, cos, …"""
    cosines, sines = timestep_embedding(torch.arange(frames, device=device), dim).chunk(2, dim=-1)
    return torch.stack([sines, cosines], dim=-1).flatten(1)


class MotionModule(nn.Module):
    """Frames attend to each other at each position: h [B·F, C, H, W] → the same shape.

    channels: C. heads: of the attention.
    positions: one of POSITIONS.
    attentions: number of attention layers before the feed-forward layer; AnimateDiff has two.
    expansion: of the feed-forward layer.
    norm_over_frames: whether the group normalisation takes its mean and variance over all frames
        of a film, as diffusers' AnimateDiff does, or over each frame alone, as its authors' code.
    time_dim: dimension of the time embedding, whose projection is added to each frame; None:
        without, as AnimateDiff.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 4,
        positions: str = "circular",
        attentions: int = 1,
        expansion: int = 2,
        norm_over_frames: bool = False,
        time_dim: int | None = None,
    ):
        super().__init__()
        self.norm_over_frames = norm_over_frames
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.time = nn.Linear(time_dim, channels) if time_dim is not None else None
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(attentions))
        self.attentions = nn.ModuleList(
            FrameAttention(channels, heads, positions) for _ in range(attentions)
        )
        self.norm_out = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, expansion)
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, h, frames: int, time_embedding=None):
        """frames: F, by which the number of images in h is divisible.

        time_embedding: [B·F, time_dim].
        """
        film = h.unflatten(0, (-1, frames))                         # [B, F, C, H, W]
        if self.norm_over_frames:
            film = self.norm(film.transpose(1, 2)).transpose(1, 2)
        else:
            film = self.norm(h).view_as(film)
        y = film.permute(0, 3, 4, 1, 2).flatten(0, 2)               # [B·H·W, F, C]
        y = self.proj_in(y)
        if self.time is not None:
            shift = self.time(F.silu(time_embedding)).unflatten(0, (-1, frames))    # [B, F, C]
            y = y + shift.repeat_interleave(h.shape[2] * h.shape[3], dim=0)
        for norm, attention in zip(self.norms, self.attentions):
            y = y + attention(norm(y))
        y = y + self.feed_forward(self.norm_out(y))
        y = self.proj_out(y)
        y = y.unflatten(0, (-1, *h.shape[2:])).permute(0, 3, 4, 1, 2)  # [B, F, C, H, W]
        return h + y.flatten(0, 1)


class VideoUNet(UNet):
    """(film x_t [B, C, F, H, W], t [B], context [B, L, D], mask) → [B, C, F, H, W].

    t, context and mask are those of UNet, the same for all frames of a film. A context of its own
    for each frame is [B, F, L, D] with a mask bool [B, F, L].

    motion: arguments of MotionModule, by name.
    timed: whether the time embedding, to which `pooled` adds the caption, also enters the motion
        modules. They then know how noisy the film is, and which motion is asked for.
    settings: those of UNet, by name.

    `forward` also takes `residuals`, the outputs of a ControlNet for each frame: [B·F, ...]. It
    raises ValueError for a tensor that is not a film, and as that of UNet does.
    """

    def __init__(self, motion: dict | None = None, timed: bool = True, **settings):
        super().__init__(**settings)
        motion = motion or {}
        self.settings |= dict(motion=motion, timed=timed)
        time_dim = self.time[-1].out_features if timed else None

        def make_modules(stages):
            """A motion module for each stage that has a residual block, else None."""
            return nn.ModuleList(
                None if isinstance(stage[0], Downsample)
                else MotionModule(stage[0].conv2.out_channels, time_dim=time_dim, **motion)
                for stage in stages
            )

        self.motion_down = make_modules(self.down)
        self.motion_middle = MotionModule(self.channels[-1], time_dim=time_dim, **motion)
        self.motion_up = make_modules(self.up)

    @classmethod
    def from_unet(cls, unet: UNet, timed: bool = True, **motion) -> "VideoUNet":
        """Inflate a trained UNet: its weights, and new motion modules.

        timed: see the class. motion: arguments of MotionModule, by name.
        """
        video = cls(motion, timed, **unet.settings)
        video.load_state_dict(video.state_dict() | unet.state_dict())
        return video.to(unet.conv_in.weight)

    def motion_parameters(self) -> list[nn.Parameter]:
        """The parameters of the motion modules; all others are those of the image network."""
        return [
            parameter for name, parameter in self.named_parameters() if name.startswith("motion_")
        ]

    def forward(self, x, t, context=None, mask=None, residuals=None):
        if x.ndim != 5:
            raise ValueError(f"a film is [B, C, F, H, W], not of the shape {tuple(x.shape)}")
        self.check_context(context, mask, len(x))
        self.check_size(x)
        dtype = self.conv_in.weight.dtype
        frames = x.shape[2]

        h, t, context, mask = frames_to_batch(x.to(dtype), t, context, mask)
        context = None if context is None else context.to(dtype)
        time_embedding = self.embed_time(t, context, mask)

        # As in UNet.forward, with a motion module after the blocks of each stage
        h = self.conv_in(F.pixel_unshuffle(h, self.patch))
        skips = [h]
        for stage, motion in zip(self.down, self.motion_down):
            h = self.run_stage(stage, h, time_embedding, context, mask)
            if motion is not None:
                h = motion(h, frames, time_embedding)
            skips.append(h)
        h = self.run_stage(self.middle[:-1], h, time_embedding, context, mask)
        h = self.motion_middle(h, frames, time_embedding)
        h = self.run_stage(self.middle[-1:], h, time_embedding, context, mask)
        if residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, residuals)]
            h = h + residuals[-1]
        for stage, motion in zip(self.up, self.motion_up):
            blocks = stage[:-1] if isinstance(stage[-1], Upsample) else stage
            h = torch.cat([h, skips.pop()], dim=1)
            h = self.run_stage(blocks, h, time_embedding, context, mask)
            h = motion(h, frames, time_embedding)
            h = self.run_stage(stage[len(blocks):], h, time_embedding, context, mask)
        h = self.conv_out(F.silu(self.norm_out(h)))
        h = F.pixel_shuffle(h, self.patch)                          # [B·F, C, H, W]
        return h.unflatten(0, (-1, frames)).transpose(1, 2)         # [B, C, F, H, W]


def frames_to_batch(x, t, context=None, mask=None) -> tuple:
    """The inputs of a VideoUNet as those of a UNet whose images are the frames.

    x: films [B, C, F, H, W] → [B·F, C, H, W].
    t: [B] or [1] → [B·F].
    context, mask: [B, L, D] and [B, L], or [B, F, L, D] and [B, F, L], a context for each frame →
        [B·F, L, D] and [B·F, L]. One row for all films stays one.

    Raises ValueError for a context of another number of frames, and a mask of another shape.
    """
    batch, frames = len(x), x.shape[2]
    per_frame = context is not None and context.ndim == 4
    if per_frame and context.shape[1] != frames:
        raise ValueError(f"a context of {context.shape[1]} frames does not fit {frames}")
    if mask is not None and mask.shape[1:] != context.shape[1:-1]:
        raise ValueError(
            f"a mask {tuple(mask.shape)} does not fit a context {tuple(context.shape)}"
        )

    def repeat(y):
        """The rows of a context or a mask for all frames."""
        if y is None or (len(y) == 1 and batch > 1 and not per_frame):
            return y
        if per_frame:
            return y.expand(batch, *y.shape[1:]).flatten(0, 1)
        return y.repeat_interleave(frames, dim=0)

    images = x.transpose(1, 2).flatten(0, 1)
    t = t.expand(batch).repeat_interleave(frames)
    return images, t, repeat(context), repeat(mask)
