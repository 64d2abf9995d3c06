"""Presets for films: a text-to-image model becomes one of films, and samples them.

    inflate_model       adds motion modules to a model of images, and the names of motions
    Films               a dataset of films in the order of axes that networks take
    generate_films      names → films
    complete_film       generates the frames that are not given: from an image to a film, or more
                        frames in between
    windowed            a denoiser for films that are longer than those of the training

>>> from .presets import build_networks
>>> model = Model(*build_networks("番茄汤"), autoencoder=None)       # random weights
>>> model = inflate_model(model)
>>> generate_films(model, ["转动番茄汤"], frames=4, size=32, steps=2).shape
(1, 4, 32, 32, 3)
"""

import numpy as np
import torch

from datasets.dish_films import FRAMES, MOTIONS

from .diffusion.prediction import Prediction
from .diffusion.samplers import ddim
from .generate import guided_denoiser, sample_shape, to_images
from .images import to_uint8
from .inpainting.repaint import repaint_sampling
from .networks.motion import VideoUNet
from .presets import REPAINT
from .pretrained import Model

MOTION = dict(heads=4, positions="circular")    # of the motion modules
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
    channels, height, width = sample_shape(size, autoencoder)
    denoise = guided_denoiser(
        network, encoder, diffusion, names, guidance, clip=autoencoder is None
    )
    x_T = diffusion.draw_noise(
        (len(names), channels, frames, height, width),
        [torch.Generator().manual_seed(seed + i) for i in range(len(names))],
        next(network.parameters()).device,
    )
    *_, last = ddim(denoise, diffusion.schedule, steps=steps, x_T=x_T)
    flat = last.x.transpose(1, 2).flatten(0, 1)                     # [B·F, C, h, w]
    return to_images(flat, autoencoder).reshape(len(names), frames, size, size, 3)


def complete_film(
    model: Model,
    name: str,
    film: np.ndarray,
    is_known: np.ndarray,
    steps: int = 25,
    guidance: float = 2.0,
    seed: int = 0,
) -> np.ndarray:
    """Generate the frames of a film that are not known, by RePaint with a mask of frames.

    With the first frame known it makes a film of an image. With every second one known it
    generates those in between. The model needs no training for it; it must work on pixels.

    film: uint8 [F, H, W, 3]; what the unknown frames show does not matter.
    is_known: bool [F].

    Returns uint8 [F, H, W, 3], the known frames unchanged. Raises ValueError for a model of
    latents, and for numbers of frames that differ.
    """
    network, encoder, diffusion, autoencoder = model
    if autoencoder is not None:
        raise ValueError("complete_film needs a model of pixels, not one of latents")
    if len(is_known) != len(film):
        raise ValueError(f"{len(is_known)} values of is_known do not fit {len(film)} frames")
    device = next(network.parameters()).device
    x0 = torch.from_numpy(film).to(device).permute(3, 0, 1, 2)[None] / 127.5 - 1   # [1, 3, F, H, W]
    unknown = ~torch.from_numpy(is_known).to(device)
    mask = unknown[None, None, :, None, None].expand(1, 1, *x0.shape[2:])
    denoise = guided_denoiser(network, encoder, diffusion, [name], guidance)
    *_, last = repaint_sampling(
        denoise, diffusion.schedule, x0, mask, steps, **REPAINT,
        generator=torch.Generator().manual_seed(seed),
    )
    generated = to_uint8(last.x[0].transpose(0, 1))                 # [F, H, W, 3]
    return np.where(is_known[:, None, None, None], film, generated)


def windowed(denoise, frames: int, stride: int):
    """Make a denoiser of long films from one of films of `frames` frames.

    Windows of this length lie `stride` frames apart along the film, and go on from its end to its
    beginning, so that the film is a loop. Where they overlap, their predictions are averaged, so
    that the parts of the film agree (Bar-Tal et al., "MultiDiffusion", 2023, eq. 5, along time).

    denoise: (x_t [B, C, frames, H, W], t) → Prediction.

    Raises ValueError for a stride outside of 1 … frames; the denoiser for a film shorter than a
    window.
    """
    if not 1 <= stride <= frames:
        raise ValueError(f"stride must be from 1 to {frames}, not {stride}")

    def denoise_long(x_t, t):
        length = x_t.shape[2]
        if length < frames:
            raise ValueError(f"a film of {length} frames is shorter than a window of {frames}")
        starts = range(0, length, stride) if length > frames else [0]
        x0, eps = torch.zeros_like(x_t), torch.zeros_like(x_t)
        count = torch.zeros(length, device=x_t.device)
        for start in starts:
            window = torch.arange(start, start + frames, device=x_t.device) % length
            prediction = denoise(x_t[:, :, window], t)
            x0[:, :, window] += prediction.x0
            eps[:, :, window] += prediction.eps
            count[window] += 1
        count = count[:, None, None]
        return Prediction(x0=x0 / count, eps=eps / count)

    return denoise_long
