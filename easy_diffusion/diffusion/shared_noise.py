"""Noise that the frames of a film have in common.

    eps_f = sqrt(fraction) · common + sqrt(1 - fraction) · own_f

Frames of a film resemble each other. If their noises do, too, the network has less to agree upon:
two frames with the same noise and the same content are denoised alike (Ge et al., "Preserve Your
Own Correlation: A Noise Prior for Video Diffusion Models", 2023, section 4.2, the mixed noise
model). The noise of each frame alone is standard normal, as ever, so that the schedule, the loss
and the samplers stay the same. Training and sampling must use the same fraction.

The file needs torch and, beside it, gaussian.py, prediction.py, schedule.py and timesteps.py.

>>> from .schedule import NoiseSchedule
>>> diffusion = SharedNoiseDiffusion(0.5, NoiseSchedule.cosine(1000), prediction_type="x0")
>>> tuple(diffusion.draw_noise((2, 3, 8, 16, 16)).shape)
(2, 3, 8, 16, 16)
"""

import math

import torch

from .gaussian import GaussianDiffusion


class SharedNoiseDiffusion(GaussianDiffusion):
    """A GaussianDiffusion of films [B, C, F, H, W] whose frames have noise in common.

    fraction: of the variance of the noise, 0 … 1, else ValueError; it is also the correlation of
        the noises of two frames. 0 is GaussianDiffusion.
    settings: arguments of GaussianDiffusion.

    For sampling give x_T = `draw_noise(shape, generator)` to the sampler.
    """

    def __init__(self, fraction: float, *settings, **more_settings):
        super().__init__(*settings, **more_settings)
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be from 0 to 1, not {fraction}")
        self.fraction = fraction

    def draw_noise(self, shape, generator=None, device="cpu", dtype=torch.float32) -> torch.Tensor:
        if len(shape) != 5:
            raise ValueError(f"a film is [B, C, F, H, W], not of the shape {tuple(shape)}")
        own = super().draw_noise(shape, generator, device, dtype)
        batch, channels, _, height, width = shape
        common = super().draw_noise((batch, channels, 1, height, width), generator, device, dtype)
        return math.sqrt(self.fraction) * common + math.sqrt(1 - self.fraction) * own
