"""Image generation with trained networks: from the names of dishes to images.

These functions cover what the demo, the page, the notebooks and the benchmarks need:

    sample_names           one sample for each name, step by step, with classifier-free guidance
    generate_images        the same with DDIM, only the finished images
    make_held_out_sheet    images of names that the network was not trained on, beside drawn ones
    load_x0                an image file as what the network works on
    make_model_inpainter   RePaint with the same network (Lugmayr et al., "RePaint", 2022)

All work on pixels or, if an autoencoder is given, on its latents. Guidance is

    eps = eps_uncond + scale · (eps_cond − eps_uncond)      (Ho & Salimans 2022, with scale = 1 + w)

>>> from .presets import build_networks
>>> network, encoder, diffusion = build_networks("番茄炒鸡蛋")
>>> generate_images(network, encoder, diffusion, ["番茄炒鸡蛋"], size=32, steps=2).shape
(1, 32, 32, 3)
"""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from datasets.aipos import DECODE_ERRORS, load_photo
from datasets.dishes import dish_names, draw_dish

from .diffusion.flow_matching import flow_euler
from .diffusion.guidance import clipped, guided
from .diffusion.prediction import Prediction
from .diffusion.samplers import ddim
from .images import contact_sheet, to_uint8
from .inpainting.latent_repaint import make_latent_inpainter
from .inpainting.repaint import make_inpainter
from .latent_space import decode_to_uint8, make_encoder
from .networks.autoencoder import Autoencoder
from .networks.fast_unet import make_fast
from .presets import REPAINT, SIZE
from .training.cuda_graphs import CudaGraphs
from .training.distributed import autocast


@torch.no_grad()
def guided_denoiser(
    network, encoder, diffusion, names: list[str], guidance: float, clip: bool = True
) -> Callable:
    """Build the denoiser (x_t, t) → Prediction for these names, one image per name.

    guidance: scale of classifier-free guidance; 1 means no guidance.
    clip: keep x0 in [-1, 1], the range of pixels; False for latents.
    The unconditional caption is `encoder.uncond`, or "" if the encoder has no such attribute.
    It computes in bfloat16 where the hardware supports it. A UNet is called through FastUNet.
    """
    device = next(network.parameters()).device
    with autocast(device):
        context, mask = encoder(names)                      # [B, L, D], [B, L]
        uncond = getattr(encoder, "uncond", "")
        context_uncond, mask_uncond = encoder([uncond])     # [1, L, D], [1, L]
    network = make_fast(network)
    denoise_cond = diffusion.denoiser(network, context, mask)
    denoise_uncond = diffusion.denoiser(network, context_uncond, mask_uncond)
    denoise = guided(denoise_cond, denoise_uncond, guidance)
    if clip:
        denoise = clipped(denoise, diffusion.schedule)

    def denoise_autocast(inputs):
        with autocast(inputs["x_t"].device):
            return denoise(**inputs)

    graphs = CudaGraphs(denoise_autocast, device)

    def denoise_replayed(x_t, t):
        inputs = {"x_t": x_t, "t": t}
        if device.type != "cuda" or torch.is_grad_enabled():
            return denoise_autocast(inputs)
        # The next call overwrites what this one returns.
        return Prediction(*(None if value is None else value.clone() for value in graphs(inputs)))

    return denoise_replayed


def sample_names(
    network,
    encoder,
    diffusion,
    names: list[str],
    size: int | tuple[int, int] = SIZE,
    steps: int = 25,
    guidance: float = 2.0,
    seed: int | list[int] = 0,
    autoencoder: Autoencoder | None = None,
    sampler: Callable = ddim,
) -> Iterator:
    """Sample one image for each name; yields every step of the sampler.

    A step's x and x0 are images or, with an autoencoder, latents; `to_images` converts them.

    size: height and width of the images in pixels, one number or two.
    steps: sampling steps; each evaluates the network with and without the name.
    guidance: scale of classifier-free guidance; 1 means no guidance.
    seed: of the first image; the next ones have seed + 1, seed + 2, …; or a list of all seeds. An
        image depends on its name and its seed alone, not on the others in the batch.
    autoencoder: decodes the samples if the network was trained on latents.
    sampler: of samplers.py; a network that was trained by flow matching uses Euler's method.
    """
    seeds = range(seed, seed + len(names)) if isinstance(seed, int) else seed
    if len(seeds) != len(names):
        raise ValueError(f"{len(seeds)} seeds do not fit {len(names)} names")
    denoise = guided_denoiser(
        network, encoder, diffusion, names, guidance, clip=autoencoder is None
    )
    options = dict(
        shape=(len(names), *sample_shape(size, autoencoder)),
        steps=steps,
        generator=[torch.Generator().manual_seed(each) for each in seeds],
        device=next(network.parameters()).device,
    )
    if diffusion.prediction_type == "velocity":
        return flow_euler(denoise, **options)
    return sampler(denoise, diffusion.schedule, **options)


def sample_shape(
    size: int | tuple[int, int], autoencoder: Autoencoder | None
) -> tuple[int, int, int]:
    """Shape (C, H, W) of a sample for images of this size: of the latent with an autoencoder."""
    height, width = (size, size) if isinstance(size, int) else size
    if autoencoder is None:
        return 3, height, width
    factor = autoencoder.factor
    return autoencoder.settings["latent_channels"], height // factor, width // factor


def to_images(x: torch.Tensor, autoencoder: Autoencoder | None) -> np.ndarray:
    """Convert samples, latents if there is an autoencoder, to images uint8 [B, H, W, 3]."""
    return to_uint8(x) if autoencoder is None else decode_to_uint8(autoencoder, x)


def load_x0(path: Path, size: int, autoencoder) -> torch.Tensor:
    """Load the middle square of an image file at the model's size, as x0 [C, H, W].

    x0 is the image in [-1, 1] or, with an autoencoder, its latent. The square is resized, and a
    note says so if it was smaller.

    Raises FileNotFoundError, or ValueError for a file that is no image, damaged, or too large.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
        pixels = load_photo(path, size)                                 # uint8 [size, size, 3]
    except FileNotFoundError:
        raise
    except DECODE_ERRORS as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if min(width, height) < size:
        print(f"note: {path} has {width}×{height} pixels; it is enlarged to {size}×{size}, which "
              "blurs it", file=sys.stderr)
    image = torch.from_numpy(pixels).permute(2, 0, 1)                   # uint8 [3, size, size]
    if autoencoder is None:
        return image / 127.5 - 1
    mean, _ = make_encoder(autoencoder)(image[None])
    return mean[0]


def generate_images(
    network,
    encoder,
    diffusion,
    names: list[str],
    size: int | tuple[int, int] = SIZE,
    steps: int = 25,
    guidance: float = 2.0,
    seed: int | list[int] = 0,
    show_progress: bool = False,
    autoencoder: Autoencoder | None = None,
) -> np.ndarray:
    """Generate one image for each name with DDIM: uint8 [B, height, width, 3].

    Arguments as for `sample_names`.
    """
    sampling = sample_names(
        network, encoder, diffusion, names, size, steps, guidance, seed, autoencoder
    )
    *_, last = tqdm(
        sampling,
        total=steps,
        desc=f"sampling {len(names)} dishes",
        unit="step",
        disable=not show_progress,
    )
    return to_images(last.x, autoencoder)


def make_held_out_sheet(models, size: int, guidance: float = 2.0, count: int = 12) -> Image.Image:
    """Make a contact sheet of `count` held-out dishes: from each model, and drawn (right).

    models: (network, encoder, diffusion, autoencoder) each, for images of `size` pixels.
    """
    names = random.Random(0).sample(dish_names("held_out"), count)
    columns = [
        generate_images(
            network,
            encoder,
            diffusion,
            names,
            size,
            guidance=guidance,
            show_progress=True,
            autoencoder=autoencoder,
        )
        for network, encoder, diffusion, autoencoder in models
    ]
    drawn = [draw_dish(name, size, seed=1).transpose(1, 2, 0) for name in names]    # [H, W, 3]
    cells = [list(images) for images in zip(*columns, drawn)]
    return contact_sheet(cells, names, columns=3)


def make_model_inpainter(
    network,
    encoder,
    diffusion,
    autoencoder: Autoencoder | None,
    name: str,
    steps: int = 25,
    guidance: float = 2.0,
    seed: int = 1,
    progress: Callable = iter,
) -> Callable:
    """Make an inpainter (image uint8 [H, W, 3], mask bool [H, W]) → image from the network.

    autoencoder: RePaint works on its latents; None: on pixels.
    name: caption of the inpainted region; "" continues the surroundings without a caption.
    steps: noise levels of RePaint.
    guidance: scale of classifier-free guidance; 1 means no guidance.
    seed: of one generator, which every call of the inpainter advances. It should differ from
        the seed of the image, whose initial noise would otherwise be used again.
    progress: wraps the steps of each call, for example in a tqdm bar.
    """
    denoise = guided_denoiser(
        network, encoder, diffusion, [name], guidance, clip=autoencoder is None
    )
    options = dict(
        steps=steps,
        generator=torch.Generator().manual_seed(seed),
        size_multiple=network.size_multiple,
        progress=progress,
        **REPAINT,
    )
    if autoencoder is None:
        device = next(network.parameters()).device
        return make_inpainter(denoise, diffusion.schedule, device=device, **options)
    return make_latent_inpainter(denoise, diffusion.schedule, autoencoder, **options)
