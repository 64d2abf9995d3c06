"""DDIM inversion: the noise from which DDIM generates a given image.

A step of DDIM from t to s is x_s = alpha_s x0 + sigma_s eps, with x0 and eps predicted at x_t.
Solved for x_t:

    x_t = alpha_t / alpha_s · (x_s - sigma_s eps(x_t, t)) + sigma_t eps(x_t, t)

x_t is on both sides. The first guess is eps(x_s, t) (Song et al., "Denoising Diffusion Implicit
Models", 2021, section 4.3). Its error falls as 1 / steps. Further iterations put the last x_t into
eps; if they converge, the step is inverted exactly (Pan et al., "Effective Real Image Editing with
Accelerated Iterative Diffusion Inversion", 2023, eq. 7).

With guidance the iterations need not converge: invert without it, and with the caption of the
image.

The file needs torch and the folder diffusion/.

>>> from ..diffusion.prediction import Prediction
>>> from ..diffusion.samplers import ddim
>>> from ..diffusion.schedule import NoiseSchedule
>>> schedule = NoiseSchedule.cosine(1000)
>>> def denoise(x_t, t):                                # optimal for data from N(0, I)
...     alpha_t, sigma_t = schedule.alpha_at(int(t[0])), schedule.sigma_at(int(t[0]))
...     return Prediction(x0=alpha_t * x_t, eps=sigma_t * x_t)
>>> image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
>>> *_, last = ddim_inversion(denoise, schedule, image, steps=50, iterations=20)
>>> *_, again = ddim(denoise, schedule, steps=50, spacing="uniform", x_T=last.x)
>>> bool((again.x - image).abs().max() < 1e-4)
True
"""

from collections.abc import Iterator
from itertools import pairwise

import torch

from ..diffusion.samplers import Step, spaced_timesteps


@torch.no_grad()
def ddim_inversion(
    denoise, schedule, x0: torch.Tensor, steps: int = 50, iterations: int = 1, spacing="uniform"
) -> Iterator[Step]:
    """Find the noise of images x0 [B, C, H, W]; yields a Step for each timestep, t rising.

    denoise: (x_t, t) → Prediction, with the caption of the images and without guidance.
    steps, spacing: those of the `ddim` that is to generate the images again, from the last Step's x
        as its x_T. "uniform" leaves out the noisiest timestep, where alpha_t is nearly 0: x_t says
        nothing of the image there, and the iterations do not converge.
    iterations: evaluations of the denoiser in each step, 1 or more; else ValueError.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, not {iterations}")
    timesteps = spaced_timesteps(len(schedule), steps, spacing)[::-1]
    x_s = x0
    for index, (s, t) in enumerate(pairwise([-1, *timesteps])):
        ratio = schedule.alpha_at(t) / schedule.alpha_at(s)
        x_t = x_s
        for _ in range(iterations):
            prediction = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device))
            eps = prediction.eps
            x_t = ratio * (x_s - schedule.sigma_at(s) * eps) + schedule.sigma_at(t) * eps
        x_s = x_t
        yield Step(index, t, x_t, prediction.x0)
