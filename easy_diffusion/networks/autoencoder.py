"""Variational autoencoder: encodes an image into a small latent and decodes it again.

    encoder      image [B, 3, H, W] → mean and log-variance of z, [B, Z, H/f, W/f] each
    posterior    z = mean + exp(log_variance / 2) · eps
    KL           ½ Σ (mean² + variance - 1 - log_variance)
    decoder      z → image [B, 3, H, W]

(Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4 and appendix B.)

Most values of an image describe fine texture, which matters little for what it shows. A latent
with f = 8 and Z = 4 is a 48× compression of the image. Diffusion in that space is latent
diffusion, as in Stable Diffusion (Rombach et al., "High-Resolution Image Synthesis with Latent
Diffusion Models", 2022). `Autoencoder.stable_diffusion()` builds the autoencoder of Stable
Diffusion 1 and can load its weights. The network consists of convolutions in residual blocks.
Only at the coarsest level do the positions of the image attend to each other.

The file needs torch, safetensors and, beside it, attention_kernels.py, blocks.py,
stable_diffusion_weights.py and weights_io.py.

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
from .weights_io import load_tree, load_weights, save_tree


class Posterior(NamedTuple):
    """q(z | image): an independent Gaussian for each element of a latent.

    mean, log_variance: [B, Z, h, w] each.
    """

    mean: torch.Tensor
    log_variance: torch.Tensor

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw z ~ q, [B, Z, h, w]; eps is drawn on the generator's device, in float32 or higher
        precision, and then moved, so that a seed gives the same eps in every precision."""
        device = generator.device if generator is not None else self.mean.device
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        eps = torch.randn(self.mean.shape, generator=generator, device=device, dtype=dtype)
        eps = eps.to(self.mean)
        return self.mean + torch.exp(self.log_variance / 2) * eps

    def kl(self) -> torch.Tensor:
        """KL(q || N(0, I)) in nats, summed over each latent: [B]."""
        kl = 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)
        return kl.flatten(1).sum(dim=1)


class Autoencoder(nn.Module):
    """Images [B, image_channels, H, W] in [-1, 1] ↔ latents [B, latent_channels, H/f, W/f].

    f = patch · 2^(levels - 1) is the attribute `factor`.

    channels: number of channels of each level, from the finest to the coarsest; multiples of 32.
    blocks: residual blocks a level in the encoder; the decoder has one more.
    patch: side in pixels of the squares that enter as one position with patch² times the channels,
        which saves the expensive finest levels.
    scale, shift: (z - shift) · scale has a standard deviation of about 1, as diffusion expects
        (Rombach et al. 2022, section D.1, where the shift is 0). `encode` and `decode` do not apply
        them: their latents are unscaled.

    `encode` raises ValueError for an image whose height or width is not a multiple of f.
    """

    def __init__(
        self,
        channels=(64, 128, 128),
        latent_channels: int = 4,
        image_channels: int = 3,
        blocks: int = 2,
        patch: int = 1,
        scale: float = 1.0,
        shift: float = 0.0,
    ):
        super().__init__()
        if any(width % 32 for width in channels):
            raise ValueError(f"channels must be multiples of 32, not {tuple(channels)}")
        self.settings = dict(
            channels=tuple(channels),
            latent_channels=latent_channels,
            image_channels=image_channels,
            blocks=blocks,
            patch=patch,
        )
        self.factor = patch * 2 ** (len(channels) - 1)
        self.patch = patch
        self.scale = scale
        self.shift = shift
        patch_channels = image_channels * patch**2
        self.encoder = Encoder(patch_channels, 2 * latent_channels, channels, blocks)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, patch_channels, channels, blocks + 1)

    @classmethod
    def stable_diffusion(cls) -> "Autoencoder":
        """The autoencoder of Stable Diffusion 1: 83.7 M weights, f = 8, Z = 4, scale 0.18215."""
        return cls(channels=(128, 256, 512, 512), scale=0.18215)

    def load_stable_diffusion(self, path) -> "Autoencoder":
        """Load weights from `path`, see stable_diffusion_weights.py; return the autoencoder."""
        load_stable_diffusion(self, path)
        return self

    def forward(
        self, images: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, Posterior]:
        """Reconstruct images [B, C, H, W] from z ~ q(z | image); return the result and q."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(generator)), posterior

    def encode(self, images: torch.Tensor) -> Posterior:
        """q(z | image) of images [B, C, H, W], with unscaled z [B, Z, H/f, W/f]."""
        if images.shape[-2] % self.factor or images.shape[-1] % self.factor:
            raise ValueError(
                f"height and width must be multiples of {self.factor} for this autoencoder, "
                f"not {tuple(images.shape[-2:])}"
            )
        dtype = self.quant_conv.weight.dtype
        h = self.encoder(F.pixel_unshuffle(images.to(dtype), self.patch))  # [B, 2Z, H/f, W/f]
        # Not in half precision, which would round a small standard deviation away.
        with torch.autocast(h.device.type, enabled=False):
            mean, log_variance = self.quant_conv(h.to(dtype)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30, 20))  # [B, Z, H/f, W/f] each

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Unscaled latents [B, Z, h, w] → images [B, C, f·h, f·w]."""
        with torch.autocast(z.device.type, enabled=False):
            h = self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype))
        return F.pixel_shuffle(self.decoder(h), self.patch)


class Encoder(nn.Module):
    """[B, C, H, W] → [B, 2Z, H/f, W/f], f = 2^(levels - 1); down[0] is the finest level."""

    def __init__(self, in_channels, out_channels, channels, blocks):
        super().__init__()
        c = channels[0]
        self.conv_in = nn.Conv2d(in_channels, c, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(channels):
            layers = nn.ModuleList()
            for _ in range(blocks):
                layers.append(make_residual_block(c, width))
                c = width
            if level < len(channels) - 1:
                layers.append(AsymmetricDownsample(c))
            self.down.append(layers)
        self.middle = make_middle(c)
        self.norm_out = nn.GroupNorm(32, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)  # [B, C', H, W]
        for level in self.down:
            for layer in level:
                h = layer(h)
        h = self.middle(h)  # [B, C', H/f, W/f]
        return self.conv_out(F.silu(self.norm_out(h)))  # [B, 2Z, H/f, W/f]


class Decoder(nn.Module):
    """[B, Z, h, w] → [B, C, f·h, f·w], f = 2^(levels - 1); up[0] is the coarsest level."""

    def __init__(self, in_channels, out_channels, channels, blocks):
        super().__init__()
        c = channels[-1]
        self.conv_in = nn.Conv2d(in_channels, c, 3, padding=1)
        self.middle = make_middle(c)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            layers = nn.ModuleList()
            for _ in range(blocks):
                layers.append(make_residual_block(c, width))
                c = width
            if level > 0:
                layers.append(Upsample(c))
            self.up.append(layers)
        self.norm_out = nn.GroupNorm(32, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, z):
        h = self.middle(self.conv_in(z))  # [B, C', h, w]
        for level in self.up:
            for layer in level:
                h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # [B, C, f·h, f·w]


def make_middle(channels):
    """Two residual blocks with self-attention between them, for the coarsest level."""
    return nn.Sequential(
        make_residual_block(channels, channels),
        SpatialSelfAttention(channels),
        make_residual_block(channels, channels),
    )


def make_residual_block(c_in, c_out):
    """A residual block without time; unlike in the UNet, its last layer is not zero at first."""
    block = ResidualBlock(c_in, c_out, time_dim=None, eps=1e-6)
    block.conv2.reset_parameters()
    return block


class AsymmetricDownsample(nn.Module):
    """A convolution of stride 2, padded only on the right and at the bottom.

    [B, C, H, W] → [B, C, H/2, W/2]. Stable Diffusion's autoencoder pads in this way.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention over the H·W positions, with a skip: [B, C, H, W] → the same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.attention = Attention(channels, heads=1, bias=True)

    def forward(self, x):
        positions = self.norm(x).flatten(2).transpose(1, 2)  # [B, H·W, C]
        h = self.attention(positions).transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]
        return x + h


def save_autoencoder(path, autoencoder: Autoencoder, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights of an autoencoder and all arguments that rebuild it to one file.

    dtype: of the weights in the file; torch.float16 halves its size.
    Raises OSError if the disk is full.
    """
    settings = autoencoder.settings | {"channels": list(autoencoder.settings["channels"])}
    tree = {
        "autoencoder": settings,
        "scale": autoencoder.scale,
        "shift": autoencoder.shift,
        "weights": {name: weight.to(dtype) for name, weight in autoencoder.state_dict().items()},
    }
    save_tree(path, tree)


def load_autoencoder(path) -> Autoencoder:
    """Rebuild the autoencoder that `save_autoencoder` wrote, in eval mode.

    Raises FileNotFoundError, or ValueError for a file that is damaged or not of an autoencoder.
    """
    saved = load_tree(path)
    if not isinstance(saved, dict) or "autoencoder" not in saved:
        raise ValueError(f"{path} is a checkpoint, but not one of an autoencoder")
    settings = dict(saved["autoencoder"])
    if "picture_channels" in settings:  # the name of image_channels before version 2
        settings["image_channels"] = settings.pop("picture_channels")
    autoencoder = Autoencoder(**settings, scale=saved["scale"], shift=saved["shift"])
    load_weights(autoencoder, saved["weights"])
    return autoencoder.eval()
