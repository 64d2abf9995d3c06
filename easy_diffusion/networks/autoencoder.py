"""The autoencoder: from a picture to a small tensor and back, so that diffusion may work on the small one.

    encoder      picture [B, 3, H, W] ─▶ mean and log-variance of z, [B, Z, H/f, W/f] each
    posterior    z = mean + exp(log-variance / 2) ε                        Kingma & Welling, "Auto-Encoding Variational Bayes", 2014
    KL           ½ Σ (mean² + variance - 1 - log-variance)                 the same, appendix B
    decoder      z ─▶ picture [B, 3, H, W]

A picture's fine grain costs most of its numbers and means little; with f = 8 and Z = 4 a latent has 48 times fewer. Diffusion in
that space is Stable Diffusion (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022), and with
the numbers of `Autoencoder.stable_diffusion()` this class is its autoencoder, which loads its weights. The network is convolutions
in residual blocks; only in the middle, where the picture is smallest, places look at each other. The file needs torch and blocks.py
beside it; to load weights of Stable Diffusion, stable_diffusion.py and checkpoint.py, too.

>>> autoencoder = Autoencoder(channels=(32, 64))
>>> posterior = autoencoder.encode(torch.randn(2, 3, 32, 32))
>>> posterior.mean.shape, autoencoder.decode(posterior.sample()).shape
(torch.Size([2, 4, 16, 16]), torch.Size([2, 3, 32, 32]))
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import Attention, ResidualBlock, Upsample
from .stable_diffusion_weights import load_stable_diffusion


class Posterior(NamedTuple):
    """q(z | picture), a Gaussian for each number of the latent: mean and log_variance, both [B, Z, h, w]."""

    mean: torch.Tensor
    log_variance: torch.Tensor

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """z ~ q, [B, Z, h, w]; the noise is drawn where the generator lives."""
        source = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=source, dtype=self.mean.dtype).to(self.mean.device)
        return self.mean + torch.exp(self.log_variance / 2) * noise

    def kl(self) -> torch.Tensor:
        """KL(q || N(0, I)) in nats, [B], summed over the latent."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).flatten(1).sum(dim=1)


class Autoencoder(nn.Module):
    """Pictures [B, image_channels, H, W] in [-1, 1] ↔ latents [B, latent_channels, H/f, W/f], f = patch · 2^(levels - 1).

    channels: one number a level, each a multiple of 32, the finest first. blocks: residual blocks a level in the encoder, one more in
    the decoder. patch: squares of so many pixels enter as one place with as many numbers, which spares the costly finest level.
    scale, shift: (z - shift) · scale has a spread of about 1, as diffusion wants it (Rombach et al. 2022, section D.1, without a shift).
    ValueError for a picture whose sides are no multiples of f.
    """

    def __init__(self, channels=(64, 128, 128), latent_channels: int = 4, image_channels: int = 3, blocks: int = 2, patch: int = 1,
                 scale: float = 1.0, shift: float = 0.0):
        super().__init__()
        if any(c % 32 for c in channels):
            raise ValueError(f"channels are multiples of 32, not {tuple(channels)}")
        self.settings = dict(channels=tuple(channels), latent_channels=latent_channels, image_channels=image_channels, blocks=blocks,
                             patch=patch)
        self.factor, self.patch, self.scale, self.shift = patch * 2 ** (len(channels) - 1), patch, scale, shift
        numbers = image_channels * patch ** 2                             # of a place
        self.encoder = Encoder(numbers, 2 * latent_channels, channels, blocks)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, numbers, channels, blocks + 1)

    @classmethod
    def stable_diffusion(cls) -> "Autoencoder":
        """Stable Diffusion 1's: 83.7 M weights, f = 8, four latent channels, scale 0.18215."""
        return cls(channels=(128, 256, 512, 512), scale=0.18215)

    def load_stable_diffusion(self, path) -> "Autoencoder":
        """Weights from a folder or file of diffusers or of the original; see stable_diffusion.py. Returns itself."""
        load_stable_diffusion(self, path)
        return self

    def forward(self, pictures: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, Posterior]:
        """Pictures [B, C, H, W] → the same, decoded from z ~ q(z | picture), and q."""
        posterior = self.encode(pictures)
        return self.decode(posterior.sample(generator)), posterior

    def encode(self, pictures: torch.Tensor) -> Posterior:
        """q(z | picture) of pictures [B, C, H, W]; its numbers are not scaled."""
        if pictures.shape[-2] % self.factor or pictures.shape[-1] % self.factor:
            raise ValueError(f"height and width are multiples of {self.factor} for this autoencoder, not {tuple(pictures.shape[-2:])}")
        pictures = F.pixel_unshuffle(pictures.to(self.quant_conv.weight.dtype), self.patch)
        h = self.encoder(pictures)
        with torch.autocast(h.device.type, enabled=False):                  # in half precision a small deviation would be rounded away
            mean, log_variance = self.quant_conv(h.to(self.quant_conv.weight.dtype)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30, 20))                 # [B, Z, H/f, W/f]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, Z, h, w], not scaled → pictures [B, C, f·h, f·w]."""
        with torch.autocast(z.device.type, enabled=False):
            h = self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype))
        return F.pixel_shuffle(self.decoder(h), self.patch)


class Encoder(nn.Module):
    """[B, C, H, W] → [B, 2Z, H/f, W/f], f = 2^(levels - 1)."""

    def __init__(self, in_channels, out_channels, channels, blocks):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down, c = nn.ModuleList(), channels[0]
        for level, width in enumerate(channels):
            self.down.append(nn.ModuleList())
            for _ in range(blocks):
                self.down[-1].append(make_residual_block(c, width))
                c = width
            if level < len(channels) - 1:
                self.down[-1].append(AsymmetricDownsample(c))
        self.middle = nn.Sequential(make_residual_block(c, c), SpatialSelfAttention(c), make_residual_block(c, c))
        self.norm_out, self.conv_out = nn.GroupNorm(32, c, eps=1e-6), nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)                                                 # [B, C, H, W]
        for level in self.down:
            for part in level:
                h = part(h)                                                 # … [B, C', H/f, W/f]
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))         # [B, 2Z, H/f, W/f]


class Decoder(nn.Module):
    """[B, Z, h, w] → [B, C, f·h, f·w], f = 2^(levels - 1); up[0] is the coarsest level, where it begins."""

    def __init__(self, in_channels, out_channels, channels, blocks):
        super().__init__()
        c = channels[-1]
        self.conv_in = nn.Conv2d(in_channels, c, 3, padding=1)
        self.middle = nn.Sequential(make_residual_block(c, c), SpatialSelfAttention(c), make_residual_block(c, c))
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            self.up.append(nn.ModuleList())
            for _ in range(blocks):
                self.up[-1].append(make_residual_block(c, width))
                c = width
            if level:
                self.up[-1].append(Upsample(c))
        self.norm_out, self.conv_out = nn.GroupNorm(32, c, eps=1e-6), nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, z):
        h = self.middle(self.conv_in(z))                                    # [B, C', h, w]
        for level in self.up:
            for part in level:
                h = part(h)                                                 # … [B, C, f·h, f·w]
        return self.conv_out(F.silu(self.norm_out(h)))                      # [B, C, f·h, f·w]


def make_residual_block(c_in, c_out):
    """A residual block without a time, its second convolution not zeroed: there is no noise here to begin gently with."""
    block = ResidualBlock(c_in, c_out, time_dim=None, eps=1e-6)
    block.conv2.reset_parameters()
    return block


class AsymmetricDownsample(nn.Module):
    """A convolution of stride 2, padded at the right and below alone: [B, C, H, W] → [B, C, H/2, W/2]."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SpatialSelfAttention(nn.Module):
    """Each place of the picture looks at all others, one head: [B, C, H, W] → [B, C, H, W]."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.attention = Attention(channels, heads=1, bias=True)

    def forward(self, x):
        places = self.norm(x).flatten(2).transpose(1, 2)                    # [B, H·W, C]
        return x + self.attention(places).transpose(1, 2).unflatten(2, x.shape[2:])
