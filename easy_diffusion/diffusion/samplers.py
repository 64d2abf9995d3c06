"""Samplers: DDPM, DDIM, DPM-Solver++ and Heun turn noise into images.

A sampler takes a denoiser, a function (x_t, t) -> Prediction(x0, eps, log_variance). It starts
from noise and visits a decreasing list of timesteps. One step goes from a timestep t to the next
one in the list, s < t. The last step goes to s = -1, the clean image, where alpha_bar = 1. After
every step the sampler yields a `Step`, which the caller can log or show.

Below, x0, eps and log_variance are those of the Prediction at x_t. DDPM and DDIM need the beta of
the whole jump from t to s, which is beta_t if s = t - 1, and the posterior variance beta_tilde:

    beta_ts = 1 - alpha_bar_t / alpha_bar_s
    beta_tilde = beta_ts (1 - alpha_bar_s) / (1 - alpha_bar_t)

DDPM draws x_s from a Gaussian (Ho et al., "Denoising Diffusion Probabilistic Models", 2020, eq. 7):

    x_s = c_0 x0 + c_t x_t + std z,    z ~ N(0, I)
    c_0 = sqrt(alpha_bar_s) beta_ts / (1 - alpha_bar_t)
    c_t = sqrt(alpha_bar_t / alpha_bar_s) (1 - alpha_bar_s) / (1 - alpha_bar_t)
    std² = beta_tilde if log_variance is None;
           else exp(log_variance) (if s = t - 1; for longer steps see _ddpm_std)

DDIM resembles x_t = alpha_t x0 + sigma_t eps: it adds as much noise as x_s contains, partly the
predicted eps and partly new noise (Song et al., "Denoising Diffusion Implicit Models", 2021,
eq. 12 and 16):

    x_s = alpha_s x0 + sqrt(sigma_s² - std²) eps + std z
    std² = eta² beta_tilde

It is deterministic for eta = 0. For eta = 1 it equals DDPM with the posterior variance. Euler
ancestral ("Euler a") is `ddim` with eta = 1.

With eta = 0, DDIM solves an ordinary differential equation: dx̄/dσ̄ = eps(x̄, σ̄), with
x̄_t = x_t / alpha_t and σ̄_t = sigma_t / alpha_t. It is Euler's method, a method of first order.
Divide x_t = alpha_t x0 + sigma_t eps by alpha_t, and the step of DDIM by alpha_s:

    x̄_t = x0 + σ̄_t eps
    x̄_s = x0 + σ̄_s eps = x̄_t + (σ̄_s - σ̄_t) eps

So `ddim_step` does not need x_t: x0 and eps determine it. Two samplers are methods of second order:

    Heun            x̄_s = x̄_t + (σ̄_s - σ̄_t) (eps_t + eps_s) / 2
                    eps_s: the prediction at the end of a DDIM step

    DPM-Solver++    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) x0_mid
                    λ = log(alpha / sigma),  h = λ_s - λ_t
                    x0_mid = x0 + h / (2 h_prev) (x0 - x0_prev)
                    x0_prev and h_prev are those of the previous step; x0_mid extrapolates x0
                    to the middle of the current step

The formula of DPM-Solver++ follows from DDIM. By the definition of λ, e^-h = σ̄_s / σ̄_t. Put
eps = (x_t - alpha_t x0) / sigma_t into the DDIM step:

    x_s = alpha_s x0 + sigma_s eps = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) x0

DPM-Solver++ is this step with x0_mid in place of x0.

(Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
algorithm 1; Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
Models", 2022, algorithm 2.)

The file needs torch and numpy and, beside it, prediction.py; its examples also schedule.py.

>>> from .prediction import Prediction, eps_from_x0
>>> from .schedule import NoiseSchedule
>>> schedule, shape = NoiseSchedule.cosine(1000), (2, 3, 8, 8)
>>> def denoise(x_t, t):                                    # every clean image is grey
...     x0 = torch.zeros_like(x_t)
...     return Prediction(x0, eps_from_x0(x0, x_t, t, schedule))
>>> *_, last_step = ddim(denoise, schedule, shape, steps=5)
>>> last_step.index, last_step.t, last_step.x.shape
(4, 199, torch.Size([2, 3, 8, 8]))

`*_, last_step` keeps every Step in memory until the last. For many steps use a for loop, which
keeps the last one only.

Every sampler accepts any choice of timesteps:

>>> timesteps = karras_timesteps(schedule, 5)
>>> *_, last_step = dpm_solver(denoise, schedule, shape, spacing=timesteps)

A new sampler is a step function that `sampling_loop` calls, here deterministic DDIM. A step that
needs memory or another network call is a closure, as in `dpm_solver` and `heun`.

>>> def step(schedule, prediction, x_t, t, s, z):
...     return schedule.alpha_at(s) * prediction.x0 + schedule.sigma_at(s) * prediction.eps
>>> timesteps = spaced_timesteps(len(schedule), 5)
>>> steps = sampling_loop(step, denoise, schedule, timesteps, shape=shape, stochastic=False)
>>> [step.t for step in steps]
[999, 799, 599, 399, 199]
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from .prediction import normal_noise


class Step(NamedTuple):
    """One step of a sampler, from timestep t to the next one.

    index: number of the step, from 0.
    t: the timestep at which the step started.
    x: the sample after the step, [B, C, H, W]; the last Step's x is the result.
    x0: the clean image that the denoiser predicted at t, [B, C, H, W].
    """

    index: int
    t: int
    x: torch.Tensor
    x0: torch.Tensor


# ---------------------------------------------------------------- the loop


@torch.no_grad()
def sampling_loop(
    step, denoise, schedule, timesteps: list[int], *, shape=None,
    generator=None, device="cpu", dtype=torch.float32, x_T=None, stochastic: bool = True,
) -> Iterator[Step]:
    """Run a step function over a list of timesteps; the loop of every sampler in this file.

    step: a function (schedule, prediction, x_t, t, s, z) -> x_s.
        prediction: the denoiser's Prediction at x_t.
        x_t, x_s: the sample before and after the step, [B, C, H, W].
        t, s: the current and the next timestep, int; s = -1 in the last step. There
            schedule.alpha_t[s] would be the last element, the noisiest timestep: use
            schedule.alpha_at(s), sigma_at(s) and alpha_bar_at(s), which are 1, 0 and 1.
        z: new standard normal noise [B, C, H, W]; None if not stochastic.
    timesteps: strictly decreasing, for example from `spaced_timesteps`.
    stochastic: whether the step function needs z.

    Other arguments: as for `ddpm`. Yields one Step for each timestep.
    """
    x = initial_noise(shape, generator, device, dtype, x_T)
    for index, (t, s) in enumerate(itertools.pairwise([*timesteps, -1])):
        prediction = denoise(x, torch.full((len(x),), t, device=x.device))
        z = normal_noise(x.shape, generator, x.device, x.dtype) if stochastic else None
        x = step(schedule, prediction, x, t, s, z)
        yield Step(index, t, x, prediction.x0)


def initial_noise(shape, generator, device, dtype, x_T) -> torch.Tensor:
    """The noise from which sampling starts, [B, C, H, W].

    It is x_T, converted to float32 if its precision is lower. If x_T is None, it is new noise of
    this shape, device and dtype. Raises ValueError if both shape and x_T are None.
    """
    if x_T is not None:
        return x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    if shape is None:
        raise ValueError("a sampler needs either shape (B, C, H, W) or x_T, the initial noise")
    return normal_noise(shape, generator, device, dtype)


# ---------------------------------------------------------------- samplers


def ddpm(
    denoise, schedule, shape=None, steps=None, spacing="trailing",
    generator=None, device="cpu", dtype=torch.float32, x_T=None,
) -> Iterator[Step]:
    """DDPM, also called ancestral sampling.

    denoise: (x_t [B, C, H, W], t int64 [B]) -> Prediction.
    schedule: a NoiseSchedule.
    shape: (B, C, H, W) of the samples, unless x_T is given.
    steps: number of steps, 1 … T; None = T.
    spacing: "trailing", "uniform", "quadratic" or a list of timesteps, see `spaced_timesteps`.
    generator: source of all noise; None = PyTorch's default generator; a list of B generators: one
        for each image.
    device, dtype: of the samples, if x_T is None. dtype: float32 or float64; for half precision
        use autocast inside the denoiser.
    x_T: the initial noise [B, C, H, W]; None = drawn from the generator. The name is Ho et al.'s:
        x_t at the first timestep of sampling.

    Yields one Step for each timestep; the last one's x is the sample. The last step returns its
    mean, without noise. (diffusers adds noise in the last step of the "trailing" spacing, unless
    the variance is "fixed_small".)
    """
    if steps is None:
        steps = len(schedule)
    timesteps = spaced_timesteps(len(schedule), steps, spacing)
    return sampling_loop(
        ddpm_step, denoise, schedule, timesteps,
        shape=shape, generator=generator, device=device, dtype=dtype, x_T=x_T,
    )


def ddpm_step(
    schedule, prediction, x_t: torch.Tensor, t: int, s: int, z: torch.Tensor
) -> torch.Tensor:
    """One DDPM step from x_t to x_s with noise z, all [B, C, H, W]; without noise if s = -1."""
    alpha_bar_t = schedule.alpha_bar_at(t)
    alpha_bar_s = schedule.alpha_bar_at(s)
    beta_ts = 1 - alpha_bar_t / alpha_bar_s
    c_0 = math.sqrt(alpha_bar_s) * beta_ts / (1 - alpha_bar_t)
    c_t = math.sqrt(alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    mean = c_0 * prediction.x0 + c_t * x_t
    if s < 0:
        return mean
    return mean + _ddpm_std(schedule, prediction.log_variance, t, s) * z


def _ddpm_std(schedule, log_variance, t: int, s: int):
    """The standard deviation of a DDPM step from t to s ≥ 0: a float or a tensor.

    log_variance: that of the step from t to t - 1, or None for the posterior variance beta_tilde.
        If s < t - 1, it is interpolated to lie at the same fraction between the bounds of the
        step from t to s. A longer step needs a larger variance, and the fraction is what networks
        learn (Nichol & Dhariwal 2021, eq. 15).
    """
    lower, upper = _log_variance_bounds(schedule, t, s)
    if log_variance is None:
        return math.exp(lower / 2)
    if s < t - 1:
        lower_prev, upper_prev = _log_variance_bounds(schedule, t, t - 1)   # of the step to t - 1
        fraction = (log_variance - lower_prev) / (upper_prev - lower_prev)
        log_variance = lower + fraction * (upper - lower)
    return torch.exp(log_variance / 2)


def _log_variance_bounds(schedule, t: int, s: int) -> tuple[float, float]:
    """log beta_tilde and log beta_ts, the lower and upper bound, for the step from t to s ≥ 0."""
    alpha_bar_t = schedule.alpha_bar_at(t)
    alpha_bar_s = schedule.alpha_bar_at(s)
    log_beta_ts = math.log(1 - alpha_bar_t / alpha_bar_s)
    log_beta_tilde = log_beta_ts + math.log((1 - alpha_bar_s) / (1 - alpha_bar_t))
    return log_beta_tilde, log_beta_ts


def ddim(
    denoise, schedule, shape=None, steps=50, eta=0.0, spacing="trailing",
    generator=None, device="cpu", dtype=torch.float32, x_T=None,
) -> Iterator[Step]:
    """DDIM, deterministic or stochastic.

    eta: 0 … 1. With 0 the samples depend on x_T alone; 1 is DDPM with the posterior variance, and
        Euler ancestral.

    Other arguments and yielded Steps: as for `ddpm`; steps cannot be None.
    Raises ValueError if eta is not in 0 … 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be 0 (deterministic) to 1 (DDPM), not {eta}")
    timesteps = spaced_timesteps(len(schedule), steps, spacing)
    return sampling_loop(
        partial(ddim_step, eta=eta), denoise, schedule, timesteps, shape=shape,
        generator=generator, device=device, dtype=dtype, x_T=x_T, stochastic=eta > 0,
    )


def ddim_step(
    schedule, prediction, x_t: torch.Tensor, t: int, s: int, z: torch.Tensor | None, eta: float
) -> torch.Tensor:
    """One DDIM step from x_t to x_s with noise z, all [B, C, H, W]; z is not used if eta = 0."""
    alpha_s = schedule.alpha_at(s)
    sigma_t = schedule.sigma_at(t)
    sigma_s = schedule.sigma_at(s)
    beta_ts = 1 - schedule.alpha_bar_at(t) / schedule.alpha_bar_at(s)
    std = eta * sigma_s / sigma_t * math.sqrt(beta_ts)
    # max: rounding may make the difference slightly negative
    coef_eps = math.sqrt(max(sigma_s ** 2 - std ** 2, 0.0))
    x_s = alpha_s * prediction.x0 + coef_eps * prediction.eps
    return x_s + std * z if eta > 0 else x_s


def dpm_solver(
    denoise, schedule, shape=None, steps=20, stochastic=False, spacing="trailing",
    generator=None, device="cpu", dtype=torch.float32, x_T=None,
) -> Iterator[Step]:
    """DPM-Solver++ (2M): a multistep method of second order, one network call per step.

    stochastic: if True, the SDE variant, which adds noise in each step:
        x_s = (sigma_s / sigma_t) e^-h x_t + alpha_s (1 - e^-2h) x0_mid + sigma_s sqrt(1 - e^-2h) z
        With x0 in place of x0_mid it is DDIM with eta = 1.

    Other arguments and yielded Steps: as for `ddpm`; steps cannot be None.
    The first step is of first order, since it has no previous step. So is the last one, as in
    diffusers: it returns the predicted x0.
    """
    x0_prev = None
    h_prev = None

    def step(schedule, prediction, x_t, t, s, z):
        nonlocal x0_prev, h_prev
        if s < 0:
            return prediction.x0

        # Extrapolate x0 to the middle of this step, linearly in λ: torch.lerp(a, b, w) is
        # a + w (b - a), here x0 + h / (2 h_prev) (x0 - x0_prev).
        # If alpha_t = 0, which only the first step can have, then h = ∞: e^-h is 0 below, and
        # h / h_prev is 0 in the next step, which therefore does not extrapolate.
        h = float(compute_lambda(schedule, s) - compute_lambda(schedule, t))
        x0 = prediction.x0
        x0_mid = x0 if x0_prev is None else torch.lerp(x0_prev, x0, 1 + h / (2 * h_prev))
        x0_prev = x0
        h_prev = h

        # The update; math.expm1(x) is e^x - 1.
        alpha_s = schedule.alpha_at(s)
        sigma_s = schedule.sigma_at(s)
        sigma_ratio = sigma_s / schedule.sigma_at(t)
        if not stochastic:
            one_minus_exp = -math.expm1(-h)             # 1 - e^-h
            # sigma_ratio x_t + alpha_s (1 - e^-h) x0_mid
            return torch.add(sigma_ratio * x_t, x0_mid, alpha=alpha_s * one_minus_exp)
        noise_fraction = -math.expm1(-2 * h)            # 1 - e^-2h: part of sigma_s² that is new
        return (
            sigma_ratio * math.exp(-h) * x_t
            + alpha_s * noise_fraction * x0_mid
            + sigma_s * math.sqrt(noise_fraction) * z
        )

    timesteps = spaced_timesteps(len(schedule), steps, spacing)
    return sampling_loop(
        step, denoise, schedule, timesteps, shape=shape,
        generator=generator, device=device, dtype=dtype, x_T=x_T, stochastic=stochastic,
    )


def compute_lambda(schedule, t: int) -> torch.Tensor:
    """λ_t = log(alpha_t / sigma_t), half the log-SNR; -inf where alpha_t = 0."""
    return (schedule.alpha_t[t] / schedule.sigma_t[t]).log()


def heun(
    denoise, schedule, shape=None, steps=18, spacing=None,
    generator=None, device="cpu", dtype=torch.float32, x_T=None,
) -> Iterator[Step]:
    """Heun's method of second order: two network calls per step, one in the last step.

    spacing: as for `ddpm`; None = `karras_timesteps(schedule, steps)`, with σ̄ of at most 80.
        The correction of a step is proportional to its length in σ̄, and so are the errors of the
        correction. Of 18 evenly spaced timesteps of the cosine schedule the first step goes from a
        σ̄ of 20291 to 11. The other samplers have no factor of this kind, so only heun has this
        default.

    Other arguments and yielded Steps: as for `ddpm`; steps cannot be None.
    """
    def step(schedule, prediction, x_t, t, s, z):
        x_s = ddim_step(schedule, prediction, x_t, t, s, z, eta=0.0)
        # No second-order correction where it is undefined: σ̄_t = ∞ if alpha_t = 0, and there is
        # no prediction at s = -1.
        if s < 0 or schedule.alpha_at(t) == 0:
            return x_s
        alpha_s = schedule.alpha_at(s)
        sigma_bar_t = schedule.sigma_at(t) / schedule.alpha_at(t)
        sigma_bar_s = schedule.sigma_at(s) / alpha_s
        prediction_s = denoise(x_s, torch.full((len(x_s),), s, device=x_s.device))
        # The DDIM step is x̄_t + (σ̄_s - σ̄_t) eps_t. To replace eps_t by (eps_t + eps_s) / 2, add
        # (σ̄_s - σ̄_t) (eps_s - eps_t) / 2; the factor alpha_s turns x̄_s into x_s.
        return x_s + alpha_s * (sigma_bar_s - sigma_bar_t) * (prediction_s.eps - prediction.eps) / 2

    if spacing is None:
        spacing = karras_timesteps(schedule, steps)
    timesteps = spaced_timesteps(len(schedule), steps, spacing)
    return sampling_loop(
        step, denoise, schedule, timesteps, shape=shape,
        generator=generator, device=device, dtype=dtype, x_T=x_T, stochastic=False,
    )


# ---------------------------------------------------------------- timesteps


def spaced_timesteps(num_timesteps: int, steps: int, spacing="trailing") -> list[int]:
    """Choose `steps` of the timesteps 0 … num_timesteps - 1, in decreasing order.

    spacing:
        "trailing"   evenly spaced, counted down from num_timesteps - 1, so that sampling starts
                     at the noisiest timestep (Lin et al., "Common diffusion noise schedules and
                     sample steps are flawed", 2023, table 2).
        "uniform"    evenly spaced, counted up from 0 in strides of num_timesteps // steps. The
                     first timestep used is (steps - 1) · stride, below num_timesteps - 1
                     (Song et al. 2021, appendix D.2; "leading" in diffusers).
        "quadratic"  (num_timesteps - 1) u² for u evenly spaced in [0, 1], so denser at small t
                     (same appendix; its authors' code goes up to 0.8 num_timesteps).
        a list       these timesteps; `steps` is ignored.

    Raises ValueError for an unknown spacing, for steps outside 1 … num_timesteps, and for a list
    that does not decrease strictly or has a value outside 0 … num_timesteps - 1.
    """
    if not isinstance(spacing, str):
        return _check_timesteps([int(t) for t in spacing], num_timesteps)
    _check_steps(steps, num_timesteps)
    if spacing == "trailing":
        return [round(num_timesteps - i * num_timesteps / steps) - 1 for i in range(steps)]
    if spacing == "uniform":
        stride = num_timesteps // steps
        return [i * stride for i in reversed(range(steps))]
    if spacing == "quadratic":
        if steps == 1:
            return [num_timesteps - 1]
        roots = [i / (steps - 1) for i in reversed(range(steps))]           # 1, …, 0
        return round_timesteps([(num_timesteps - 1) * u ** 2 for u in roots], num_timesteps)
    raise ValueError(
        f'spacing must be "trailing", "uniform", "quadratic" or a list, not {spacing!r}'
    )


def karras_timesteps(
    schedule, steps: int, rho: float = 7.0, sigma_bar_max: float = 80.0
) -> list[int]:
    """The timesteps nearest to the noise levels of Karras et al. 2022, eq. 5, in decreasing order.

        σ̄_i = (high^(1/rho) + i / (steps - 1) (low^(1/rho) - high^(1/rho)))^rho
        i = 0 … steps - 1,    σ̄ = sigma_t / alpha_t
        low, high: the lowest and the highest σ̄ of the schedule, the latter at most sigma_bar_max

    schedule: a NoiseSchedule.
    steps: how many timesteps, 1 … T.
    rho: the larger, the more of them lie at low noise.
    sigma_bar_max: limit of `high`. The cosine schedule reaches a σ̄ of thousands, where x_t contains
        practically no image.

    Nearest is meant in log σ̄. No timestep occurs twice.
    Raises ValueError if steps is not in 1 … T.
    """
    _check_steps(steps, len(schedule))
    sigma_bar = (schedule.sigma_t / schedule.alpha_t).numpy()               # σ̄ [T], increasing
    root_high = min(sigma_bar[-1], sigma_bar_max) ** (1 / rho)
    root_low = sigma_bar[0] ** (1 / rho)
    fractions = np.arange(steps) / max(steps - 1, 1)                        # 0, …, 1
    levels = (root_high + fractions * (root_low - root_high)) ** rho        # σ̄_i [steps]

    # Find the fractional t of each level: interpolate t linearly as a function of log σ̄.
    # Leave out an infinite σ̄, which occurs where alpha_t = 0.
    t_known = np.flatnonzero(np.isfinite(sigma_bar))
    log_sigma_bar = np.log(sigma_bar[t_known])
    t = np.interp(np.log(levels), log_sigma_bar, t_known)
    return round_timesteps(t.tolist(), len(schedule))


def round_timesteps(fractional: list[float], num_timesteps: int) -> list[int]:
    """Round fractional timesteps to distinct integers in 0 … num_timesteps - 1.

    fractional: at most num_timesteps values, in decreasing order.

    Returns as many integers, in strictly decreasing order. Where several values round to the same
    integer, the smallest value gets it, and the others get the next higher integers. At the upper
    end, where no higher ones are left, the values move down instead.
    """
    rounded = []                                                            # in increasing order
    for t in reversed(fractional):
        lowest_free = rounded[-1] + 1 if rounded else 0
        rounded.append(max(round(t), lowest_free))

    # The largest may now exceed T - 1. Value i of n (i = 0 … n - 1) can be at most T - n + i.
    limit = num_timesteps - len(rounded)                                    # T - n
    rounded = [min(t, limit + i) for i, t in enumerate(rounded)]
    return rounded[::-1]


def _check_steps(steps: int, num_timesteps: int) -> None:
    if not 1 <= steps <= num_timesteps:
        raise ValueError(
            f"steps must be 1 to {num_timesteps}, the length of the schedule, not {steps}"
        )


def _check_timesteps(timesteps: list[int], num_timesteps: int) -> list[int]:
    decreasing = all(t > s for t, s in itertools.pairwise(timesteps))
    in_range = all(0 <= t < num_timesteps for t in timesteps)
    if not timesteps or not decreasing or not in_range:
        raise ValueError(
            f"timesteps must decrease strictly and lie in 0 to {num_timesteps - 1}, "
            f"not {timesteps}"
        )
    return timesteps
