"""TODO."""

from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm

from .diffusion.flow_matching import flow_euler
from .diffusion.guidance import clipped, guided
from .diffusion.samplers import ddim
from .images import to_uint8
from .inpainting.latent_repaint import make_latent_inpainter
from .inpainting.repaint import make_inpainter
from .latent_space import decode_to_uint8
from .networks.autoencoder import Autoencoder
from .presets import REPAINT, SIZE
from .training.distributed import autocast


@torch.no_grad()
def guided_denoiser(network, encoder, diffusion, names: list[str], guidance: float, clip: bool = True):
    """The denoiser of these dishes: guided, clipped to what pictures are, in half precision where that is faster."""
    with autocast(next(network.parameters()).device):
        text, nothing = encoder(names), encoder([""])
    denoise = guided(diffusion.denoiser(network, *text), diffusion.denoiser(network, *nothing), guidance)
    denoise = clipped(denoise, diffusion.schedule) if clip else denoise

    def denoise_fast(x_t, t):
        with autocast(x_t.device):
            return denoise(x_t, t)

    return denoise_fast


def generate_images(network, encoder, diffusion, names: list[str], size: int = SIZE, steps: int = 25, guidance: float = 2.0, seed: int = 0,
           show_progress: bool = False, autoencoder: Autoencoder | None = None) -> np.ndarray:
    """One picture for each name by DDIM, or by Euler's steps if the network has learned a flow, uint8 [B, size, size, 3]."""
    channels, factor = (3, 1) if autoencoder is None else (autoencoder.settings["latent_channels"], autoencoder.factor)
    denoise = guided_denoiser(network, encoder, diffusion, names, guidance, clip=autoencoder is None)
    how = dict(shape=(len(names), channels, size // factor, size // factor), steps=steps,
               generator=torch.Generator().manual_seed(seed), device=next(network.parameters()).device)
    walk = flow_euler(denoise, **how) if diffusion.prediction_type == "velocity" else ddim(denoise, diffusion.schedule, **how)
    *_, last = tqdm(walk, total=steps, desc=f"sampling {len(names)} dishes", unit="step", disable=not show_progress)
    return to_uint8(last.x) if autoencoder is None else decode_to_uint8(autoencoder, last.x)


def make_model_inpainter(network, encoder, diffusion, autoencoder, name: str, steps: int = 25, guidance: float = 2.0, seed: int = 1,
               progress: Callable = iter) -> Callable:
    """The demo's painter, RePaint in pixels or latents: of more of the dish of this name, or, for "", of what there is around one.

    seed: of its noise, from one painted part to the next; another one than the dish's own, which would be the same noise again."""
    denoise = guided_denoiser(network, encoder, diffusion, [name], guidance, clip=autoencoder is None)
    how = dict(steps=steps, generator=torch.Generator().manual_seed(seed), size_multiple=network.size_multiple, progress=progress, **REPAINT)
    if autoencoder is None:
        return make_inpainter(denoise, diffusion.schedule, device=next(network.parameters()).device, **how)
    return make_latent_inpainter(denoise, diffusion.schedule, autoencoder, **how)
