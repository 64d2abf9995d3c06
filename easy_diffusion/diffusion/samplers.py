"""From noise to picture: DDPM, DDIM, DPM-Solver++, Heun, and guidance.

A sampler takes a denoiser, a function (x_t, t) -> Prediction(x0, noise, log_variance), walks down a list of
timesteps and yields every step; the caller draws, logs or stops. One jump from t to an earlier s (s = -1 is the
clean picture) is, with a = alpha_bar,

    DDPM:  x_s ~ N(c0 x0 + c_t x_t, σ²),   beta = 1 - a_t / a_s,
           c0 = sqrt(a_s) beta / (1 - a_t),   c_t = sqrt(a_t / a_s) (1 - a_s) / (1 - a_t)
    DDIM:  x_s = sqrt(a_s) x0 + sqrt(1 - a_s - σ²) ε + σ z,   σ = η sqrt((1 - a_s) / (1 - a_t) · beta)

(Ho et al. 2020, eq. 7; Song et al., "Denoising Diffusion Implicit Models", 2021, eq. 12 and 16.) η = 0 is
deterministic, η = 1 is DDPM. Without the random z a sampler solves an ordinary differential equation, which in terms of
x̄ = x / signal and σ̄ = noise / signal is simply dx̄/dσ̄ = ε(x̄, σ̄). DDIM is Euler's method for it; two others look at its bend:

    Heun:           x̄_s = x̄_t + (σ̄_s - σ̄_t) (ε_t + ε_s) / 2,   ε_s at the end of Euler's step
    DPM-Solver++:   x_s = (noise_s / noise_t) x_t + signal_s (1 - e^-h) x0',   h = λ_s - λ_t,   λ = log(signal / noise),
                    x0' = x0_t + (x0_t - x0_r) h / (2 h_r): x0 in the middle of the step, from the step before, r → t

(Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, algorithm 1; Lu et al.,
"DPM-Solver++", 2022, algorithm 2.) Guidance and clipping are functions from denoiser to denoiser, so they compose.
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

from .prediction import normal_noise


class Step(NamedTuple):
    """One step of a sampler: its number from 0, the timestep t it left, the new x and the picture x0 expected at t."""

    index: int
    t: int
    x: torch.Tensor
    x0: torch.Tensor


def spaced_timesteps(total: int, steps: int, spacing="trailing") -> list[int]:
    """`steps` of the `total` timesteps, from the noisiest down.

    "uniform" counts up from 0 in strides of total // steps (Song et al. 2021, appendix D.2; diffusers' "leading"), so that it starts
    at (steps - 1) (total // steps): near the end for steps that divide total, and not for a few;
    "quadratic" grows with the square, from 0 to total - 1 (the same appendix; its authors' code ends at 0.8 total);
    "trailing" counts down from total - 1, so that sampling starts where there is only noise (Lin et al., "Common
    diffusion noise schedules and sample steps are flawed", 2023, table 2). A list of timesteps is taken as it is, and
    `steps` is ignored. Raises ValueError for other steps or spacing, and for a list that does not fall.
    """
    if not isinstance(spacing, str):
        timesteps = [int(t) for t in spacing]
        if not timesteps or any(t <= s for t, s in zip(timesteps, [*timesteps[1:], -1])) or timesteps[0] >= total:
            raise ValueError(f"timesteps fall from at most {total - 1} to at least 0, each once; these are {timesteps}")
        return timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"steps is 1 to {total}, the length of the schedule, not {steps}")
    if spacing == "uniform":
        return [i * (total // steps) for i in reversed(range(steps))]
    if spacing == "quadratic":
        return round_timesteps([(total - 1) * (i / (steps - 1)) ** 2 for i in range(steps)] if steps > 1 else [total - 1], total)
    if spacing == "trailing":
        return [round(total - i * total / steps) - 1 for i in range(steps)]
    raise ValueError(f'spacing is "uniform", "quadratic", "trailing" or a list of timesteps, not {spacing!r}')


def karras_timesteps(schedule, steps: int, rho: float = 7.0, sigma_max: float = 80.0) -> list[int]:
    """`steps` timesteps nearest to Karras' noise levels σ̄_i = (σ̄_min^(1/ρ) + i / (n - 1) (σ̄_max^(1/ρ) - σ̄_min^(1/ρ)))^ρ, the
    highest first.

    (Karras et al. 2022, eq. 5.) They crowd where there is little noise. σ̄_max is the schedule's, or `sigma_max` where that is
    less: cosine ends at thousands, where there is nothing to see. Nearest in log σ̄; each timestep once.
    """
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"steps is 1 to {len(schedule)}, the length of the schedule, not {steps}")
    sigmas = (schedule.sigma_t / schedule.alpha_t).numpy()
    high, low = min(sigmas[-1], sigma_max) ** (1 / rho), sigmas[0] ** (1 / rho)
    wanted = np.array([(low + i / max(steps - 1, 1) * (high - low)) ** rho for i in range(steps)] if steps > 1 else [high ** rho])
    finite = np.isfinite(sigmas)
    return round_timesteps(np.interp(np.log(wanted), np.log(sigmas[finite]), np.flatnonzero(finite)), len(schedule))


def round_timesteps(rising, total) -> list[int]:
    """Rising positions → whole timesteps below `total`, each once, from the noisiest down."""
    timesteps = []
    for i, t in enumerate(rising):
        timesteps.append(max(round(float(t)), timesteps[-1] + 1 if timesteps else 0))
    room = total - len(timesteps)
    return [min(t, room + i) for i, t in enumerate(timesteps)][::-1]


def ddpm_step(schedule, prediction, x_t: torch.Tensor, t: int, s: int, z: torch.Tensor) -> torch.Tensor:
    """From x_t to x_s with noise z, all [B, C, H, W].

    prediction.log_variance belongs to the single step from t to t - 1, and lies somewhere between the bounds of that step. A longer
    jump has bounds of its own, beta (1 - a_s) / (1 - a_t) and beta; its variance is put at the same place between them.
    """
    a_t, a_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
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
    a_t, a_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
    high = math.log(1 - a_t / a_s)
    return high + math.log((1 - a_s) / (1 - a_t)), high


def ddim_step(schedule, prediction, x_t: torch.Tensor, t: int, s: int, z: torch.Tensor, eta: float) -> torch.Tensor:
    """From x_t to x_s with noise z, all [B, C, H, W]; eta in [0, 1], and with eta = 0 z may be None."""
    a_t, a_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    direction = math.sqrt(max(1 - a_s - sigma ** 2, 0.0))
    x_s = math.sqrt(a_s) * prediction.x0 + direction * prediction.eps
    return x_s + sigma * z if eta else x_s


def initial_noise(shape, generator, device, dtype, x_T) -> torch.Tensor:
    """x_T, in float32 at least; or, if it is None, noise of this shape."""
    if x_T is not None:
        return x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    if shape is None:
        raise ValueError("a sampler needs either shape, (B, C, H, W), or x_T, the noise to start from")
    return normal_noise(shape, generator, device, dtype)


@torch.no_grad()
def sampling_loop(step, denoise, schedule, shape, timesteps, generator, device, dtype, x_T, noisy=True) -> Iterator[Step]:
    x = initial_noise(shape, generator, device, dtype, x_T)
    for index, (t, s) in enumerate(zip(timesteps, [*timesteps[1:], -1])):
        prediction = denoise(x, torch.full((len(x),), t, device=x.device))
        z = normal_noise(x.shape, generator, x.device, x.dtype) if noisy else None
        x = step(schedule, prediction, x, t, s, z)
        yield Step(index, t, x, prediction.x0)


def ddpm(denoise, schedule, shape=None, steps=None, spacing="trailing", generator=None, device="cpu",
         dtype=torch.float32, x_T=None) -> Iterator[Step]:
    """Ancestral sampling; yields `steps` Steps (default: one for each timestep).

    shape (B, C, H, W) of the pictures, or x_T, the noise to start from; x is float32 or float64, half precision belongs into the
    denoiser. The last Step's x is the sample: it is the mean, no noise is added to it (diffusers adds some to trailing steps, unless
    the variance is fixed_small).
    """
    timesteps = spaced_timesteps(len(schedule), len(schedule) if steps is None else steps, spacing)
    return sampling_loop(ddpm_step, denoise, schedule, shape, timesteps, generator, device, dtype, x_T)


def ddim(denoise, schedule, shape=None, steps=50, eta=0.0, spacing="trailing", generator=None, device="cpu",
         dtype=torch.float32, x_T=None) -> Iterator[Step]:
    """DDIM; yields `steps` Steps. eta = 0: x_T alone decides the picture; eta = 1: DDPM. Otherwise as `ddpm`."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is 0 (deterministic) to 1 (DDPM), not {eta}")

    def step(*now):
        return ddim_step(*now, eta)

    return sampling_loop(step, denoise, schedule, shape, spaced_timesteps(len(schedule), steps, spacing), generator, device,
                 dtype, x_T, noisy=eta > 0)


def dpm_solver(denoise, schedule, shape=None, steps=20, stochastic=False, spacing="trailing", generator=None, device="cpu",
               dtype=torch.float32, x_T=None) -> Iterator[Step]:
    """DPM-Solver++ of second order, multistep (2M): one network call a step; yields `steps` Steps. Otherwise as `ddpm`.

    stochastic: its SDE form, which adds noise at each step: x_s = (noise_s / noise_t) e^-h x_t + signal_s (1 - e^-2h) x0' +
    noise_s sqrt(1 - e^-2h) z. The first step, for want of one before, and the last are of first order, as in diffusers.
    """
    before = None

    def step(schedule, prediction, x_t, t, s, z):
        nonlocal before
        if s < 0:
            return prediction.x0
        h, x0 = float(compute_lambda(schedule, s) - compute_lambda(schedule, t)), prediction.x0
        if before is not None:
            x0_before, h_before = before
            x0 = torch.lerp(x0_before, x0, 1 + h / (2 * h_before))          # beyond x0, in the direction it came
        before = prediction.x0, h
        signal, shrink = float(schedule.alpha_t[s]), float(schedule.sigma_t[s] / schedule.sigma_t[t])
        if stochastic:
            fresh = -math.expm1(-2 * h)
            return shrink * math.exp(-h) * x_t + signal * fresh * x0 + float(schedule.sigma_t[s]) * math.sqrt(fresh) * z
        return torch.add(shrink * x_t, x0, alpha=-signal * math.expm1(-h))

    return sampling_loop(step, denoise, schedule, shape, spaced_timesteps(len(schedule), steps, spacing), generator, device,
                 dtype, x_T, noisy=stochastic)


def compute_lambda(schedule, t: int) -> torch.Tensor:
    """λ = log(signal / noise) at timestep t; -inf where there is no signal."""
    return (schedule.alpha_t[t] / schedule.sigma_t[t]).log()


def heun(denoise, schedule, shape=None, steps=18, spacing=None, generator=None, device="cpu", dtype=torch.float32,
         x_T=None) -> Iterator[Step]:
    """Heun's method of second order, by default on Karras' noise levels, from σ̄ = 80 at most: two network calls a step, one in the
    last; yields `steps` Steps. Otherwise as `ddpm`."""
    def step(schedule, prediction, x_t, t, s, z):
        x_s = ddim_step(schedule, prediction, x_t, t, s, z, eta=0.0)
        if s < 0 or schedule.alpha_t[t] == 0:            # a clean picture is not asked again; and from σ̄ = ∞ there is no trapezoid
            return x_s
        again = denoise(x_s, torch.full((len(x_s),), s, device=x_s.device))
        sigma_t, sigma_s = (float(schedule.sigma_t[i] / schedule.alpha_t[i]) for i in (t, s))
        return x_s + float(schedule.alpha_t[s]) * (sigma_s - sigma_t) * (again.eps - prediction.eps) / 2

    spacing = karras_timesteps(schedule, steps) if spacing is None else spacing
    return sampling_loop(step, denoise, schedule, shape, spaced_timesteps(len(schedule), steps, spacing), generator, device,
                 dtype, x_T, noisy=False)
