"""RePaint: inpainting with a diffusion model that was trained on whole images.

At each step from t to s, the pixels outside the mask m (1 = inpaint) come from the image x0, with
the noise of timestep s; those inside come from the model:

    x_s = m · step(x_t) + (1 - m) · (alpha_s x0 + sigma_s eps)      step: a DDPM step from t to s

This alone gives regions that do not match, because the model's step cannot change the known pixels
to fit what it generates. RePaint therefore adds noise again, up to a timestep u > s, and denoises
once more; after several such resamplings both regions agree. With a = alpha_bar,

    x_u = sqrt(a_u / a_s) x_s + sqrt(1 - a_u / a_s) eps

(Lugmayr et al., "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", 2022, eq. 8,
with the opposite meaning of m; algorithm 1 and appendix B).

`repaint_sampling` works on tensors. `make_inpainter` turns it into an *inpainter*: a function
(image uint8 [H, W, 3], mask bool [H, W], True = inpaint) → image, which returns the pixels outside
the mask unchanged.

The file needs torch and numpy, blending.py beside it, and the folder diffusion/.

>>> from ..diffusion.prediction import Prediction
>>> from ..diffusion.schedule import NoiseSchedule
>>> def denoise(x_t, t):                                # a model that predicts grey everywhere
...     return Prediction(x0=torch.zeros_like(x_t), eps=x_t)
>>> white = torch.ones(1, 3, 8, 8)
>>> mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
>>> mask[..., 4:] = True
>>> schedule = NoiseSchedule.cosine(100)
>>> *_, last = repaint_sampling(denoise, schedule, white, mask, steps=10, jump=2, resamples=2)
>>> last.x[0, 0, 0].tolist()
[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..diffusion.prediction import normal_noise
from ..diffusion.samplers import Step, ddpm_step, spaced_timesteps
from .blending import blend, check_mask, from_pixel_values, pad_to_multiple, to_pixel_values


def repaint_levels(steps: int, jump: int, resamples: int) -> list[int]:
    """List the noise levels that RePaint visits, from steps - 1 (noisiest) down to -1 (no noise).

    Two neighbours in the list differ by one: down is a denoising step, up adds noise.

    steps: number of noise levels.
    jump: number of levels to go back up, at the levels 0, jump, 2 · jump, … below steps - jump.
    resamples: how often each stretch of `jump` levels is denoised; 1 never goes up.

    Raises ValueError unless jump ≥ 1 and resamples ≥ 1.
    Source: Lugmayr et al. 2022, appendix B.
    """
    if jump < 1 or resamples < 1:
        raise ValueError(f"jump and resamples must be at least 1, not {jump} and {resamples}")
    jumps_left = {level: resamples - 1 for level in range(0, steps - jump, jump)}
    level = steps - 1
    levels = [level]
    while level >= 0:
        if jumps_left.get(level, 0) > 0:
            jumps_left[level] -= 1
            levels += range(level + 1, level + jump + 1)
            level += jump
        else:
            level -= 1
            levels.append(level)
    return levels


def count_denoiser_calls(steps: int, jump: int, resamples: int) -> int:
    """Return how many Steps `repaint_sampling` yields; arguments as for `repaint_levels`."""
    levels = repaint_levels(steps, jump, resamples)
    return sum(after < before for before, after in zip(levels, levels[1:]))


@torch.no_grad()
def repaint_sampling(
    denoise,
    schedule,
    x0: torch.Tensor,
    mask: torch.Tensor,
    steps: int = 50,
    jump: int = 5,
    resamples: int = 4,
    generator=None,
) -> Iterator[Step]:
    """RePaint's sampling loop: yields a Step for each call of the denoiser.

    denoise: (x_t, t) → Prediction.
    schedule: the NoiseSchedule of the network.
    x0: images [B, C, H, W] in [-1, 1], latents, or films [B, C, F, H, W].
    mask: bool [B or 1, 1, H, W], or [B or 1, 1, F, H, W], True = inpaint.
    steps, jump, resamples: see `repaint_levels`.
    generator: torch.Generator of the noise.

    The last Step's x is the result; outside the mask it equals x0 exactly. Each Step's x0 is the
    model's prediction of the whole image, inside and outside the mask.
    Raises ValueError for a mask of the wrong shape or dtype.
    Source: Lugmayr et al. 2022, algorithm 1.
    """
    shapes = [[batch, 1, *x0.shape[2:]] for batch in (1, len(x0))]
    if mask.dtype != torch.bool or list(mask.shape) not in shapes:
        raise ValueError(
            f"for images {list(x0.shape)} the mask must be bool {shapes[1]} or {shapes[0]}, "
            f"not {mask.dtype} {list(mask.shape)}"
        )
    timesteps = spaced_timesteps(len(schedule), steps)[::-1]            # level → t

    def sample_eps():
        return normal_noise(x0.shape, generator, x0.device, x0.dtype)

    x = sample_eps()
    index = 0
    levels = repaint_levels(steps, jump, resamples)
    for level, next_level in zip(levels, levels[1:]):
        t = timesteps[level]
        s = timesteps[next_level] if next_level >= 0 else -1
        a_t = schedule.alpha_bar_at(t)
        a_s = schedule.alpha_bar_at(s)                                  # 1 for s = -1

        # Up: add noise. x_s = sqrt(a_s / a_t) x_t + sqrt(1 - a_s / a_t) eps
        if s > t:
            x = math.sqrt(a_s / a_t) * x + math.sqrt(1 - a_s / a_t) * sample_eps()
            continue

        # Down: x_s = m · step(x_t) + (1 - m) · (alpha_s x0 + sigma_s eps)
        prediction = denoise(x, torch.full((len(x),), t, device=x.device))
        if s >= 0:
            known = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * sample_eps()
        else:
            known = x0
        generated = ddpm_step(schedule, prediction, x, t, s, sample_eps())
        x = torch.where(mask, generated, known)
        yield Step(index, t, x, prediction.x0)
        index += 1


def make_inpainter(
    denoise,
    schedule,
    steps: int = 25,
    jump: int = 5,
    resamples: int = 4,
    generator=None,
    device="cpu",
    size_multiple: int = 1,
    progress: Callable = iter,
) -> Callable:
    """Make an inpainter (image uint8 [H, W, 3], mask bool [H, W]) → image that works on pixels.

    denoise: (x_t, t) → Prediction, such as `diffusion.denoiser(network, context)`.
    schedule: the NoiseSchedule of the network.
    steps, jump, resamples: see `repaint_levels`.
    generator: torch.Generator of the noise.
    device: where the network is.
    size_multiple: height and width are padded to multiples of this, the network's `size_multiple`.
    progress: wraps the sampling loop's Steps, for example tqdm.

    Pixels outside the mask are returned unchanged. The inpainter raises ValueError for a mask of
    the wrong shape or dtype.
    """

    def inpaint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not check_mask(image, mask).any():
            return image.copy()
        height, width = mask.shape
        padded_image, padded_mask = pad_to_multiple(image, mask, size_multiple)
        x0 = from_pixel_values(padded_image).to(device)                     # [1, 3, H, W]
        pixel_mask = torch.from_numpy(padded_mask)[None, None].to(device)   # [1, 1, H, W]
        sampling = repaint_sampling(
            denoise, schedule, x0, pixel_mask, steps, jump, resamples, generator
        )
        *_, last = progress(sampling)
        # The prediction also covers the known pixels, where `blend` measures the colour error.
        inpainted = to_pixel_values(last.x0)[:height, :width]
        return blend(inpainted, image, mask)

    return inpaint
