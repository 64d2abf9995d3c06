"""Presets for films: a text-to-image model becomes one of films, and samples them.

    inflate_model       adds motion modules to a model of images, and the names of motions
    Films               a dataset of films in the order of axes that networks take
    generate_films      names → films

>>> from .presets import build_networks
>>> model = Model(*build_networks("番茄汤"), autoencoder=None)       # random weights
>>> model = inflate_model(model)
>>> generate_films(model, ["转动番茄汤"], frames=4, size=32, steps=2).shape
(1, 4, 32, 32, 3)
"""

import numpy as np
import torch

from datasets.dish_films import FRAMES, MOTIONS

from .diffusion.samplers import ddim
from .generate import guided_denoiser, to_images
from .networks.motion import VideoUNet
from .pretrained import Model

MOTION = dict(heads=4, positions="circular")    # of the motion modules
FPS = 8                 # frames per second: a film of 8 frames lasts a second
BATCH = 8               # films per training step
GPU_BATCH = 64


def inflate_model(model: Model, **motion) -> Model:
    """Return the model with motion modules that have no effect yet, and the names of motions.

    motion: arguments of VideoUNet.from_unet that replace those of MOTION.
    """
    network = VideoUNet.from_unet(model.network, **MOTION | motion)
    encoder = model.encoder.with_characters("".join(MOTIONS.values()))
    return model._replace(network=network, encoder=encoder)


class Films(torch.utils.data.Dataset):
    """Films [3, F, H, W], as networks take them, of a dataset of films [F, 3, H, W]."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        frames, name = self.dataset[index]
        return frames.transpose(0, 1).contiguous(), name


def generate_films(
    model: Model,
    names: list[str],
    frames: int = FRAMES,
    size: int = 64,
    steps: int = 25,
    guidance: float = 2.0,
    seed: int = 0,
) -> np.ndarray:
    """Generate a film for each name with DDIM: uint8 [B, frames, size, size, 3].

    names: such as 转动番茄炒鸡蛋, see datasets/dish_films.py.
    seed: of the first film; the next ones have seed + 1, seed + 2, …
    """
    network, encoder, diffusion, autoencoder = model
    channels, side = network.settings["in_channels"], size
    if autoencoder is not None:
        side = size // autoencoder.factor
    denoise = guided_denoiser(
        network, encoder, diffusion, names, guidance, clip=autoencoder is None
    )
    *_, last = ddim(
        denoise,
        diffusion.schedule,
        shape=(len(names), channels, frames, side, side),
        steps=steps,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(names))],
        device=next(network.parameters()).device,
    )
    flat = last.x.transpose(1, 2).flatten(0, 1)                     # [B·F, C, h, w]
    return to_images(flat, autoencoder).reshape(len(names), frames, size, size, 3)
