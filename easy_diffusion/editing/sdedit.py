"""SDEdit: noise an image, and denoise it with another caption.

    x_t = alpha_t x0 + sigma_t eps          at the timestep t = strength · T
    x_t → x_0                               an ordinary sampler, from there on

(Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations",
2022, algorithm 1.) With little noise the image stays as it is; with much noise the caption decides.

The file needs torch and the folder diffusion/.

>>> from ..diffusion.prediction import Prediction
>>> from ..diffusion.schedule import NoiseSchedule
>>> def denoise(x_t, t):                                # a model that predicts grey everywhere
...     return Prediction(x0=torch.zeros_like(x_t), eps=x_t)
>>> edited = sdedit(denoise, NoiseSchedule.cosine(1000), torch.ones(1, 3, 8, 8), strength=0.5)
>>> len(list(edited))
25
"""

from collections.abc import Iterator
from functools import partial

import torch

from ..diffusion.prediction import normal_noise
from ..diffusion.samplers import Step, ddim_step, sampling_loop, spaced_timesteps


def sdedit(
    denoise, schedule, x0: torch.Tensor, strength: float, steps: int = 50, eta: float = 0.0,
    generator=None,
) -> Iterator[Step]:
    """Edit images x0 [B, C, H, W]; yields the Steps of DDIM.

    denoise: (x_t, t) → Prediction, with the caption of the edited image.
    strength: fraction of the timesteps that are denoised, above 0, at most 1.
    steps: of DDIM for the strength 1; `strength` times as many are taken.
    eta: 0 … 1, see `ddim`.

    Raises ValueError for a strength that is out of range, or leaves no step.
    """
    timesteps = [t for t in spaced_timesteps(len(schedule), steps) if t < strength * len(schedule)]
    if not 0 < strength <= 1 or not timesteps:
        raise ValueError(
            f"strength must be above 0 and at most 1, and leave a step of {steps}, not {strength}"
        )
    eps = normal_noise(x0.shape, generator, x0.device, x0.dtype)
    x_t = schedule.alpha_at(timesteps[0]) * x0 + schedule.sigma_at(timesteps[0]) * eps
    return sampling_loop(
        partial(ddim_step, eta=eta), denoise, schedule, timesteps,
        generator=generator, x_T=x_t, stochastic=eta > 0,
    )
