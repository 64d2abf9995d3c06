"""Diffusion inside the autoencoder's space: the way in, the way out, and repainting there.

    z = (mean + deviation ε - shift) · scale                  of a picture, with ε ~ N(0, I): what the network is trained on
    picture = decode(z / scale + shift)                       of what a sampler has made

Nothing else changes: schedules, samplers and guidance do not ask what the numbers are. There are two ways to train on latents. Encode each
picture once and keep them (`encoder_of` for datasets/latents_lmdb.py): then the autoencoder is needed again for the samples alone. Or let
the loader encode (`EncodedBatch` as `collate` of batches.py): nothing is stored, and each epoch costs the encoder's time again, on the
device or in workers. The file needs torch, numpy and safetensors and, beside it, autoencoder.py, blocks.py, checkpoint.py, samplers.py and
inpaint.py; its example also schedule.py.

>>> from .schedule import NoiseSchedule
>>> autoencoder = Autoencoder((32, 32), blocks=1, scale=2.0)
>>> pictures = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
>>> latents, names = EncodedBatch(autoencoder)([(picture, "番茄汤") for picture in pictures])
>>> tuple(latents.shape), names, tuple(decoded(autoencoder, latents).shape)
((2, 4, 8, 8), ['番茄汤', '番茄汤'], (2, 16, 16, 3))
"""

import hashlib
from collections.abc import Callable

import numpy as np
import safetensors.torch
import torch

from .images import to_uint8
from .networks.autoencoder import Autoencoder


def fingerprint(autoencoder: Autoencoder) -> str:
    """Sixteen characters that change when a weight, the scale or the shift does."""
    # The key of image_channels is that of the first version, so that stores which it wrote still match.
    settings = {name.replace("image_channels", "picture_channels"): value for name, value in autoencoder.settings.items()}
    digest = hashlib.blake2b(f"{settings} {autoencoder.scale!r} {autoencoder.shift!r}".encode(), digest_size=8)
    for tensor in autoencoder.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_encoder(autoencoder: Autoencoder) -> Callable:
    """A function: pictures uint8 [B, 3, H, W] → mean and deviation of z, float32 [B, Z, h, w] each, scaled and shifted."""
    @torch.no_grad()
    def encode(pictures):
        device = next(autoencoder.parameters()).device
        mean, log_variance = autoencoder.eval().encode(pictures.to(device).float() / 127.5 - 1)
        return (mean.float() - autoencoder.shift) * autoencoder.scale, torch.exp(log_variance.float() / 2) * autoencoder.scale

    return encode


@torch.no_grad()
def decode(autoencoder: Autoencoder, z: torch.Tensor) -> torch.Tensor:
    """Latents [B, Z, h, w] → pictures float [B, 3, H, W], about in [-1, 1]."""
    z = z.to(next(autoencoder.parameters()).device)
    return autoencoder.eval().decode(z / autoencoder.scale + autoencoder.shift).float()


def decode_to_uint8(autoencoder: Autoencoder, z: torch.Tensor) -> np.ndarray:
    """Latents [B, Z, h, w] → pictures uint8 [B, H, W, 3]."""
    return to_uint8(decode(autoencoder, z))


class EncodingCollate:
    """A collate function: [(picture uint8 [3, H, W], caption)] → (z float32 [B, Z, h, w] on the CPU, captions).

    device: where the autoencoder works. In workers it is theirs alone; on a GPU they must be spawned, which `batches` does.
    """

    def __init__(self, autoencoder: Autoencoder, device="cpu"):
        self.autoencoder, self.device, self.encode = autoencoder, device, None

    def __getstate__(self):                                                 # to a spawned worker the weights go as bytes
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.autoencoder.state_dict().items()}
        sizes = self.autoencoder.settings | {"scale": self.autoencoder.scale, "shift": self.autoencoder.shift}
        return sizes, safetensors.torch.save(weights), self.device

    def __setstate__(self, state):
        sizes, weights, device = state
        self.__init__(Autoencoder(**sizes), device)
        self.autoencoder.load_state_dict(safetensors.torch.load(weights))

    def __call__(self, items):
        if self.encode is None:
            self.encode = make_encoder(self.autoencoder.to(self.device))
        pictures, captions = zip(*items)
        mean, deviation = self.encode(torch.stack(pictures))
        return (mean + deviation * torch.randn_like(mean)).cpu(), list(captions)
