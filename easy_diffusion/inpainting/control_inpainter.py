"""Inpainting in a handful of steps, with a ControlNet that was trained for it.

RePaint inpaints with any trained model, and pays with many evaluations: it samples the whole image
again and again, until the inpainted region fits the known one (repaint.py). Here a ControlNet
(networks/controlnet.py) sees the known region, and an ordinary sampler does the rest:

    control = [image, grey in the mask; mask]                               4 channels in [0, 1]
    x ~ p(x | caption, control)                                             6 steps of DPM-Solver++
    result = blend(x, image, mask)

It is trained on what the camera moves uncover, see masked_dishes.py.

The file needs torch and numpy, from this package diffusion/ and networks/ and, beside it,
blending.py.

>>> image, mask = np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8), bool)
>>> mask[:, 4:] = True
>>> inpainting_control(image, mask)[:, 0, [0, 7]].tolist()
[[200, 127], [200, 127], [200, 127], [0, 255]]
"""

from collections.abc import Callable

import numpy as np
import torch

from ..diffusion.guidance import clipped, guided
from ..diffusion.samplers import dpm_solver
from ..networks.controlnet import Control, Controlled, ControlNet
from .blending import blend, check_mask, pad_to_multiple, to_pixel_values

CONTROL_CHANNELS = 4            # red, green, blue and the mask


def inpainting_control(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The control of an image uint8 [H, W, 3] and a mask bool [H, W]: uint8 [4, H, W].

    The first three channels are the image, 127 in the mask; the fourth is the mask, 0 or 255.
    """
    known = np.where(mask[..., None], np.uint8(127), image)
    channels = np.concatenate([known, np.uint8(255) * mask[..., None]], axis=2)
    return np.ascontiguousarray(channels.transpose(2, 0, 1))


def make_control_inpainter(
    unet,
    controlnet: ControlNet,
    encoder,
    diffusion,
    name: str,
    steps: int = 6,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
    progress: Callable = iter,
) -> Callable:
    """Make an inpainter (image uint8 [H, W, 3], mask bool [H, W]) → image.

    unet, encoder, diffusion: the text-to-image model, on pixels, whose control is `controlnet`.
    name: caption of the inpainted region; "" continues the surroundings without a caption.
    steps: of DPM-Solver++, one evaluation of both networks each, or two with guidance.
    guidance: scale of classifier-free guidance; both predictions have the control.
    generator: of the initial noise.
    progress: wraps the sampling loop's Steps, for example tqdm.

    Pixels outside the mask are returned unchanged. The inpainter raises ValueError for a mask of
    the wrong shape or dtype.
    """
    device = unet.conv_in.weight.device
    with torch.no_grad():
        context, uncond = (encoder([caption]) for caption in (name, encoder.uncond))

    @torch.no_grad()
    def inpaint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not check_mask(image, mask).any():
            return image.copy()
        height, width = mask.shape
        padded_image, padded_mask = pad_to_multiple(image, mask, unet.size_multiple)
        control = torch.from_numpy(inpainting_control(padded_image, padded_mask))[None]
        network = Controlled(unet, [Control(controlnet, control.to(device) / 255)])
        denoise = guided(
            diffusion.denoiser(network, *context), diffusion.denoiser(network, *uncond), guidance
        )
        sampling = dpm_solver(
            clipped(denoise, diffusion.schedule),
            diffusion.schedule,
            shape=(1, 3, *padded_mask.shape),
            steps=steps,
            generator=generator,
            device=device,
        )
        *_, last = progress(sampling)
        inpainted = to_pixel_values(last.x0)[:height, :width]
        return blend(inpainted, image, mask)

    return inpaint
