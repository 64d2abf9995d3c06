"""Diffusion in the latent space of an autoencoder: encoding images, decoding samples.

With the encoder's posterior N(mean, std²) and the decoder D (autoencoder.py),

    z = (mean + std · eps - shift) · scale,   eps ~ N(0, I)     the data of the diffusion network
    image = D(z / scale + shift)                                the image of a sampled z

(Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, section 3;
they have no shift). Schedules, samplers and guidance work on latents as they do on pixels.

There are two ways to train on latents:

- Encode the data set once: pass `make_encoder` to `encode_store` in datasets/latents_lmdb.py.
  Training then reads mean and std from disk and does not need the autoencoder.
- Encode each batch when it is loaded: pass `EncodingCollate` to `make_loader` in
  training/data_loader.py. Nothing is stored, and every epoch encodes all images again.

Stored latents carry the `fingerprint` of their autoencoder, because latents from a different
autoencoder are incompatible. The file needs torch, numpy and safetensors and, beside it, images.py
and the folder networks/.

>>> autoencoder = Autoencoder((32, 32), blocks=1, scale=2.0)
>>> image = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
>>> z, captions = EncodingCollate(autoencoder)([(image, "番茄汤"), (image, "番茄汤")])
>>> tuple(z.shape), captions
((2, 4, 8, 8), ['番茄汤', '番茄汤'])
>>> decode_to_uint8(autoencoder, z).shape
(2, 16, 16, 3)
"""

import hashlib
from collections.abc import Callable

import numpy as np
import safetensors.torch
import torch

from .images import to_uint8
from .networks.autoencoder import Autoencoder


def fingerprint(autoencoder: Autoencoder) -> str:
    """Hash an autoencoder's settings, scale, shift and weights to 16 hexadecimal digits."""
    # Stores of the first version hashed image_channels under the name picture_channels. It stays,
    # so that their fingerprints still match.
    settings = {
        name.replace("image_channels", "picture_channels"): value
        for name, value in autoencoder.settings.items()
    }
    header = f"{settings} {autoencoder.scale!r} {autoencoder.shift!r}"
    digest = hashlib.blake2b(header.encode(), digest_size=8)
    for tensor in autoencoder.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_encoder(autoencoder: Autoencoder) -> Callable:
    """Make a function: images uint8 [B, 3, H, W] → mean and std of z.

    Mean and std are float32 [B, Z, h, w] with Z latent channels, h = H/f and w = W/f. They are
    shifted and scaled, so that z = mean + std · eps.
    """

    @torch.no_grad()
    def encode(images):
        device = next(autoencoder.parameters()).device
        x = images.to(device).float() / 127.5 - 1                       # [B, 3, H, W] in [-1, 1]
        mean, log_variance = autoencoder.eval().encode(x)
        mean = (mean.float() - autoencoder.shift) * autoencoder.scale
        std = torch.exp(log_variance.float() / 2) * autoencoder.scale
        return mean, std

    return encode


@torch.no_grad()
def decode(autoencoder: Autoencoder, z: torch.Tensor) -> torch.Tensor:
    """Decode latents [B, Z, h, w] to images float32 [B, 3, H, W], approximately in [-1, 1]."""
    z = z.to(next(autoencoder.parameters()).device)
    return autoencoder.eval().decode(z / autoencoder.scale + autoencoder.shift).float()


def decode_to_uint8(autoencoder: Autoencoder, z: torch.Tensor) -> np.ndarray:
    """Decode latents [B, Z, h, w] to images uint8 [B, H, W, 3]."""
    return to_uint8(decode(autoencoder, z))


class EncodingCollate:
    """A collate function that encodes: [(image uint8 [3, H, W], caption)] → (z, captions).

    z is float32 [B, Z, h, w] on the CPU, with new eps at every call.

    device: where the autoencoder runs. With worker processes each of them has its own copy of the
        autoencoder; workers that use a GPU must be spawned, which `make_loader` does.
    """

    def __init__(self, autoencoder: Autoencoder, device="cpu"):
        self.autoencoder = autoencoder
        self.device = device
        self.encode = None                              # made at the first call, in the worker

    # A spawned worker receives a pickle: the settings, and the weights as the bytes of a file.

    def __getstate__(self):
        weights = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.autoencoder.state_dict().items()
        }
        settings = self.autoencoder.settings | {
            "scale": self.autoencoder.scale,
            "shift": self.autoencoder.shift,
        }
        return settings, safetensors.torch.save(weights), self.device

    def __setstate__(self, state):
        settings, weights, device = state
        self.__init__(Autoencoder(**settings), device)
        self.autoencoder.load_state_dict(safetensors.torch.load(weights))

    def __call__(self, items):
        if self.encode is None:
            self.encode = make_encoder(self.autoencoder.to(self.device))
        images, captions = zip(*items)
        mean, std = self.encode(torch.stack(images))                    # [B, Z, h, w]
        z = mean + std * torch.randn_like(mean)
        return z.cpu(), list(captions)
