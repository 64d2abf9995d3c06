"""From noise to picture: DDPM, DDIM and guidance.

A sampler takes a denoiser, a function (x_t, t) -> Prediction(x0, noise, log_variance), walks down a list of
timesteps and yields every step; the caller draws, logs or stops. One jump from t to an earlier s (s = -1 is the
clean picture) is, with a = alpha_bar,

    DDPM:  x_s ~ N(c0 x0 + c_t x_t, σ²),   beta = 1 - a_t / a_s,
           c0 = sqrt(a_s) beta / (1 - a_t),   c_t = sqrt(a_t / a_s) (1 - a_s) / (1 - a_t)
    DDIM:  x_s = sqrt(a_s) x0 + sqrt(1 - a_s - σ²) ε + σ z,   σ = η sqrt((1 - a_s) / (1 - a_t) · beta)

(Ho et al. 2020, eq. 7; Song et al., "Denoising Diffusion Implicit Models", 2021, eq. 12 and 16.) η = 0 is
deterministic, η = 1 is DDPM. Guidance and clipping are functions from denoiser to denoiser, so they compose.
The file needs nothing but torch and numpy; its example also schedule.py.

>>> from .schedule import NoiseSchedule
>>> schedule = NoiseSchedule.cosine(1000)
>>> grey = lambda x_t, t: Prediction(torch.zeros_like(x_t), x_t)          # a world where all pictures are grey
>>> *_, last = ddim(grey, schedule, shape=(2, 3, 8, 8), steps=5)
>>> last.index, last.t, tuple(last.x0.shape)
(4, 199, (2, 3, 8, 8))
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch


class Prediction(NamedTuple):
    """What a denoiser says about x_t [B, C, H, W]: the picture and the noise in it, both [B, C, H, W], and the
    logarithm of the variance of the step to t - 1, [B, 1, 1, 1] (None: the lower bound, DDPM's fixed_small)."""

    x0: torch.Tensor
    noise: torch.Tensor
    log_variance: torch.Tensor | None = None


class Step(NamedTuple):
    """One step of a sampler: its number from 0, the timestep t it left, the new x and the picture x0 expected at t."""

    index: int
    t: int
    x: torch.Tensor
    x0: torch.Tensor


def spaced_timesteps(total: int, steps: int, spacing: str = "trailing") -> list[int]:
    """`steps` of the `total` timesteps, from the noisiest down.

    "uniform" counts up from 0 in strides of total // steps (Song et al. 2021, appendix D.2; diffusers' "leading");
    "trailing" counts down from total - 1, so that sampling starts where there is only noise (Lin et al., "Common
    diffusion noise schedules and sample steps are flawed", 2023, table 2). Raises ValueError for other steps or spacing.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps is 1 to {total}, the length of the schedule, not {steps}")
    if spacing == "uniform":
        return [i * (total // steps) for i in reversed(range(steps))]
    if spacing == "trailing":
        return [round(total - i * total / steps) - 1 for i in range(steps)]
    raise ValueError(f'spacing is "uniform" or "trailing", not {spacing!r}')


def guided(denoise, denoise_nothing, scale: float):
    """Classifier-free guidance: ε = ε_nothing + scale (ε_text - ε_nothing); scale = 1 is no guidance.

    (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6, with scale = 1 + w.) x0 and ε are linear in each
    other at the same x_t, so both are mixed alike. The variance is the text's.
    """
    def denoise_guided(x_t, t):
        text = denoise(x_t, t)
        if scale == 1:
            return text
        nothing = denoise_nothing(x_t, t)
        x0, noise = (torch.lerp(a, b, scale) for a, b in ((nothing.x0, text.x0), (nothing.noise, text.noise)))
        return Prediction(x0, noise, text.log_variance)

    return denoise_guided


def clipped(denoise, schedule):
    """The picture kept within [-1, 1], the noise made to agree with it: ε = (x_t - signal x0) / noise_t."""
    def denoise_clipped(x_t, t):
        prediction = denoise(x_t, t)
        signal, amount = schedule.signal_and_noise(t, x_t)
        x0 = prediction.x0.clamp(-1, 1)
        return Prediction(x0, (x_t - signal * x0) / amount, prediction.log_variance)

    return denoise_clipped


def ddpm_step(schedule, prediction, x_t: torch.Tensor, t: int, s: int, z: torch.Tensor) -> torch.Tensor:
    """From x_t to x_s with noise z, all [B, C, H, W].

    prediction.log_variance belongs to the single step from t to t - 1. For a longer jump the variance lies between this
    jump's bounds, beta (1 - a_s) / (1 - a_t) and beta, where that one lies between its own.
    """
    a_t, a_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    beta = 1 - a_t / a_s
    mean = math.sqrt(a_s) * beta / (1 - a_t) * prediction.x0 + math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * x_t
    if s < 0:
        return mean
    low, high = _log_variance_bounds(schedule, t, s)
    log_variance = prediction.log_variance
    if log_variance is None:
        return mean + math.exp(low / 2) * z
    if s < t - 1:
        low_1, high_1 = _log_variance_bounds(schedule, t, t - 1)
        log_variance = low + (log_variance - low_1) / (high_1 - low_1) * (high - low)
    return mean + torch.exp(log_variance / 2) * z


def _log_variance_bounds(schedule, t, s):
    """Of the jump from t to s ≥ 0: log(beta (1 - a_s) / (1 - a_t)) and log(beta)."""
    a_t, a_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    high = math.log(1 - a_t / a_s)
    return high + math.log((1 - a_s) / (1 - a_t)), high


def ddim_step(schedule, prediction, x_t: torch.Tensor, t: int, s: int, z: torch.Tensor, eta: float) -> torch.Tensor:
    """From x_t to x_s with noise z, all [B, C, H, W]; eta in [0, 1]."""
    a_t, a_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    direction = math.sqrt(max(1 - a_s - sigma ** 2, 0.0))
    return math.sqrt(a_s) * prediction.x0 + direction * prediction.noise + sigma * z


def normal_noise(shape, generator=None, device="cpu", dtype=torch.float32) -> torch.Tensor:
    """Standard normal noise, drawn where the generator lives and then moved: one seed, one picture, on any device."""
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)


def to_pictures(x: torch.Tensor) -> np.ndarray:
    """Samples [B, 3, H, W] in [-1, 1] → pictures uint8 [B, H, W, 3]; what lies outside is clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def _walk(step, denoise, schedule, shape, timesteps, generator, device, dtype, x_T) -> Iterator[Step]:
    x = normal_noise(shape, generator, device, dtype) if x_T is None else x_T
    for index, (t, s) in enumerate(zip(timesteps, [*timesteps[1:], -1])):
        prediction = denoise(x, torch.full((len(x),), t, device=x.device))
        x = step(schedule, prediction, x, t, s, normal_noise(x.shape, generator, x.device, x.dtype))
        yield Step(index, t, x, prediction.x0)


def ddpm(denoise, schedule, shape=None, steps=None, spacing="trailing", generator=None, device="cpu",
         dtype=torch.float32, x_T=None) -> Iterator[Step]:
    """Ancestral sampling; yields `steps` Steps (default: one for each timestep).

    shape (B, C, H, W) of the pictures, or x_T, the noise to start from. The last Step's x is the sample: it is the mean, no
    noise is added to it (diffusers adds some, for fixed_large and trailing steps).
    """
    timesteps = spaced_timesteps(len(schedule), len(schedule) if steps is None else steps, spacing)
    return _walk(ddpm_step, denoise, schedule, shape, timesteps, generator, device, dtype, x_T)


def ddim(denoise, schedule, shape=None, steps=50, eta=0.0, spacing="trailing", generator=None, device="cpu",
         dtype=torch.float32, x_T=None) -> Iterator[Step]:
    """DDIM; yields `steps` Steps. eta = 0: x_T alone decides the picture; eta = 1: DDPM. Otherwise as `ddpm`."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is 0 (deterministic) to 1 (DDPM), not {eta}")

    def step(*now):
        return ddim_step(*now, eta)

    return _walk(step, denoise, schedule, shape, spaced_timesteps(len(schedule), steps, spacing), generator, device,
                 dtype, x_T)
