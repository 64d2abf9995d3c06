"""Diffusion in continuous time: the variance-exploding SDE, its reversal, and likelihoods.

The forward process adds noise to x for times t from 0 to 1, without scaling it down:

    dx = g(t) dw,    g(t) = σ^t                              g is the diffusion coefficient
    x_t = x0 + sigma_t eps,    eps ~ N(0, I)
    sigma_t² = ∫ g² dt = (σ^(2t) - 1) / (2 ln σ)             the marginal variance given x0

Here σ is a constant, 25 by default; alpha_t is 1. Two processes have the same distributions
p_t of x_t and can be followed from t = 1 down to 0 (dt < 0). Both need the score ∇ log p_t(x):

    dx = -g² ∇ log p_t(x) dt + g dw̄            the reverse SDE           (Anderson 1982)
    dx/dt = -½ g² ∇ log p_t(x)                  the probability flow ODE  (Song et al. 2021, eq. 13)

w is a Wiener process (Brownian motion), w̄ one in reverse time.
(Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021.)

The score is learned by denoising. The score of x_t given x0 is -eps / sigma_t, and

    E |sigma_t score(x_t, t) + eps|²

is smallest for the true score (Vincent 2011; Song et al. 2021, eq. 7). Times lie in [t_min, 1]
with t_min > 0, since the score may be infinite at t = 0.

The ODE also gives likelihoods. With its velocity v(x, t) = dx/dt (Song et al. 2021, eq. 39):

    log p(x0) = log p_1(x_1) + ∫ div v(x_t, t) dt

The file needs torch and, beside it, prediction.py.

>>> sde = VarianceExploding(sigma=25.0)
>>> def score(x, t):                                        # the exact score of data N(0, 0.5²)
...     return -x / (0.5 ** 2 + sde.marginal_std(t).view(-1, 1) ** 2)
>>> generator = torch.Generator().manual_seed(0)
>>> *_, last = euler_maruyama(score, sde, shape=(2000, 1), steps=200, generator=generator)
>>> bool(0.45 < last.mean.std() < 0.55)
True
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .prediction import broadcast_like, check_output, normal_noise


class SDEStep(NamedTuple):
    """One step of an SDE or ODE solver.

    index: number of the step, from 0.
    t: the time that the step reached.
    x: the sample at that time, [B, ...].
    mean: x without the noise of this step; for an ODE the same as x.
    """

    index: int
    t: float
    x: torch.Tensor
    mean: torch.Tensor


class VarianceExploding:
    """The variance-exploding SDE dx = σ^t dw for t in [0, 1].

    sigma: the constant σ > 1. For 25 the marginal standard deviation reaches 9.8 at t = 1.

    It takes the place of `GaussianDiffusion` in training; use it with `uniform_time`.
    The network receives 1000 t.
    """

    prediction_type = "score"

    def __init__(self, sigma: float = 25.0):
        if sigma <= 1:
            raise ValueError(f"sigma must be greater than 1, so that the noise grows, not {sigma}")
        self.sigma = sigma

    def __len__(self) -> int:
        """The scale of the time that the network receives."""
        return 1000

    def marginal_std(self, t: torch.Tensor) -> torch.Tensor:
        """sigma_t, the standard deviation of x_t given x0; t of any shape."""
        log_sigma = math.log(self.sigma)
        return torch.sqrt(torch.expm1(2 * t * log_sigma) / (2 * log_sigma))

    def diffusion_coefficient(self, t: torch.Tensor) -> torch.Tensor:
        """g(t) = σ^t; t of any shape."""
        return self.sigma ** t

    def score(self, network, context=None, mask=None):
        """The score function of a network, (x [B, ...], t float [B]) -> score [B, ...].

        The score is output / sigma_t and the network's input is x / sqrt(1 + sigma_t²), so both
        have a standard deviation of about 1 at every t.
        Raises ValueError for an output of another shape than x.
        """
        def score_of_network(x, t):
            sigma_t = broadcast_like(self.marginal_std(t), x)
            output = network(x / torch.sqrt(1 + sigma_t ** 2), 1000 * t, context, mask)
            check_output(output, x, channels=x.shape[1])
            return output.to(x.dtype) / sigma_t

        return score_of_network

    def loss(self, network, x0, t, context=None, mask=None, generator=None) -> torch.Tensor:
        """The loss |sigma_t score + eps|² of each image, the mean over its elements, [B].

        network: see `score`.
        x0: clean images [B, C, H, W].
        t: float [B] in (0, 1].
        context, mask: passed to the network; [B, L, D] and bool [B, L].
        generator: source of eps.

        Raises ValueError for integer t. (Song et al. 2021, eq. 7, weighted by sigma_t².)
        """
        if not t.is_floating_point():
            raise ValueError(
                "the times of an SDE must be floats in (0, 1], "
                f"not {t.dtype}: train with timesteps=uniform_time"
            )
        eps = normal_noise(x0.shape, generator, x0.device, x0.dtype)
        sigma_t = broadcast_like(self.marginal_std(t.to(x0.dtype)), x0)
        x_t = x0 + sigma_t * eps
        score = self.score(network, context, mask)(x_t, t.to(x0.dtype))
        return (sigma_t * score + eps).float().square().flatten(1).mean(dim=1)


# ---------------------------------------------------------------- the reverse SDE


@torch.no_grad()
def euler_maruyama(
    score, sde, shape, steps: int = 500, t_min: float = 1e-3,
    generator=None, device="cpu", dtype=torch.float32,
) -> Iterator[SDEStep]:
    """Sample the reverse SDE with the Euler–Maruyama method.

    x ← x + g² score dt + g sqrt(dt) z,    dt = t - s > 0 for a step from t down to s

    score: (x [B, ...], t float [B]) -> score [B, ...].
    sde: a VarianceExploding.
    shape: (B, ...) of the samples.
    steps: number of steps of equal length from t = 1 to t_min.
    t_min: the time at which sampling ends, in (0, 1).
    generator: source of all noise; None = PyTorch's default generator.
    device, dtype: of the samples.

    Yields `steps` SDESteps; the last one's mean is the sample.
    """
    x, times = _start(sde, shape, steps, t_min, generator, device, dtype)
    for index, (t, s) in enumerate(itertools.pairwise(times)):
        x, mean = _reverse_step(score, sde, x, t, s, generator)
        yield SDEStep(index, float(s), x, mean)


@torch.no_grad()
def predictor_corrector(
    score, sde, shape, steps: int = 500, snr: float = 0.16, corrections: int = 1,
    t_min: float = 1e-3, generator=None, device="cpu", dtype=torch.float32,
) -> Iterator[SDEStep]:
    """Euler–Maruyama steps, each after Langevin steps that bring x closer to p_t.

    snr: see `langevin_step`.
    corrections: number of Langevin steps before each step of the reverse SDE.
    Other arguments and SDESteps: as for `euler_maruyama`.

    (Song et al. 2021, algorithm 4. There the corrector follows the predictor; here the predictor
    is last, so that the last mean is free of noise.)
    """
    x, times = _start(sde, shape, steps, t_min, generator, device, dtype)
    for index, (t, s) in enumerate(itertools.pairwise(times)):
        for _ in range(corrections):
            x = langevin_step(score, x, t, snr, generator)
        x, mean = _reverse_step(score, sde, x, t, s, generator)
        yield SDEStep(index, float(s), x, mean)


def langevin_step(score, x, t, snr: float, generator=None) -> torch.Tensor:
    """One Langevin step at time t: x + δ score + sqrt(2 δ) z.

    Repeated steps bring any x to the distribution p_t, but for an error that grows with δ.

    x: [B, ...]; t: a tensor with one time.
    snr: ratio of the norms of δ score and sqrt(2 δ) z. It determines the step size
        δ = 2 (snr |z| / |score|)², with norms that are means over the batch.
    """
    gradient = score(x, t.expand(len(x)))
    z = normal_noise(x.shape, generator, x.device, x.dtype)
    z_norm = z.flatten(1).norm(dim=1).mean()
    gradient_norm = gradient.flatten(1).norm(dim=1).mean()
    delta = 2 * (snr * z_norm / gradient_norm) ** 2
    return x + delta * gradient + torch.sqrt(2 * delta) * z


def _start(sde, shape, steps, t_min, generator, device, dtype):
    """The initial noise, N(0, sigma_1²), and steps + 1 times from 1 down to t_min."""
    if steps < 1 or not 0 < t_min < 1:
        raise ValueError(
            "steps must be 1 or more and t_min in (0, 1), "
            f"not steps={steps}, t_min={t_min}"
        )
    times = torch.linspace(1, t_min, steps + 1, device=device, dtype=dtype)
    return sde.marginal_std(times[0]) * normal_noise(shape, generator, device, dtype), times


def _reverse_step(score, sde, x, t, s, generator):
    """One Euler–Maruyama step of the reverse SDE from t down to s; returns x and its mean."""
    g = sde.diffusion_coefficient(t)
    dt = t - s
    mean = x + g ** 2 * score(x, t.expand(len(x))) * dt
    z = normal_noise(x.shape, generator, x.device, x.dtype)
    return mean + g * torch.sqrt(dt) * z, mean


# ---------------------------------------------------------------- the probability flow ODE


def probability_flow(score, sde):
    """The velocity of the probability flow ODE, dx/dt = -½ g² score.

    Returns a function (x [B, ...], t float [B]) -> velocity [B, ...].
    """
    def velocity(x, t):
        return -0.5 * broadcast_like(sde.diffusion_coefficient(t) ** 2, x) * score(x, t)

    return velocity


@torch.no_grad()
def integrate_ode(
    velocity, x: torch.Tensor, start: float, end: float, steps: int = 100
) -> Iterator[SDEStep]:
    """Integrate dx/dt = velocity(x, t) with the Runge–Kutta method of fourth order.

    velocity: (x [B, ...], t float [B]) -> dx/dt [B, ...].
    x: the initial value at time start, [B, ...].
    start, end: times, in either direction. For sampling: start = 1, end = 1e-3 and an x drawn
        from N(0, sigma_1²).
    steps: number of steps of equal length, each with four network calls.

    Yields `steps` SDESteps; the last one's x is the result.
    """
    def slope(x, t):
        return velocity(x, t.expand(len(x)))

    times = _times(start, end, steps, x)
    for index, (t, s) in enumerate(itertools.pairwise(times)):
        x = _rk4_step(slope, x, t, s)
        yield SDEStep(index, float(s), x, x)


def _times(start, end, steps, x):
    """steps + 1 times from start to end, with the device and dtype of x."""
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, not steps={steps}")
    return torch.linspace(start, end, steps + 1, device=x.device, dtype=x.dtype)


def _rk4_step(slope, x, t, s):
    """One step of the classical Runge–Kutta method from time t to s; slope(x, t) = dx/dt."""
    h = s - t
    middle = (t + s) / 2
    k1 = slope(x, t)
    k2 = slope(x + h / 2 * k1, middle)
    k3 = slope(x + h / 2 * k2, middle)
    k4 = slope(x + h * k3, s)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


# ---------------------------------------------------------------- likelihoods


def log_likelihood(
    velocity, x0: torch.Tensor, prior_std: float,
    start: float = 1e-3, end: float = 1.0, steps: int = 100, generator=None,
) -> torch.Tensor:
    """log p(x0) of each image in nats, [B].

    velocity: (x [B, ...], t float [B]) -> dx/dt [B, ...], for example from `probability_flow`.
    x0: images [B, ...].
    prior_std: x has the distribution N(0, prior_std²) at time end.
    start, end: times between which the ODE is integrated.
    steps: number of Runge–Kutta steps of equal length. The score changes fastest near start,
        above all between narrow, separate modes: increase steps until the result is stable.
    generator: source of the random signs.

    log p(x0) = log N(x_end; 0, prior_std²) + ∫ div velocity dt. The divergence is estimated as
    signᵀ (∂v/∂x) sign with random signs ±1 (Skilling 1989; Hutchinson 1990; Song et al. 2021,
    eq. 40). The estimate is unbiased, and exact where ∂v/∂x is diagonal.

    Bits per dimension of D elements are -log p / (D ln 2), plus log2(127.5) for images of 256
    grey levels scaled to [-1, 1]. Add uniform noise in ±1/255 to such images first: without it
    a model's density at the discrete levels has no upper limit.
    """
    device = generator.device if generator is not None else x0.device
    signs = torch.randint(2, x0.shape, generator=generator, device=device).to(x0) * 2 - 1
    times = _times(start, end, steps, x0)

    # x and ∫ div v dt are integrated as one tensor, state [2, B, ...].
    def slope(state, t):
        with torch.enable_grad():
            x = state[0].detach().requires_grad_(True)
            v = velocity(x, t.expand(len(x)))
            gradient, = torch.autograd.grad((v * signs).sum(), x)           # signᵀ ∂v/∂x
        divergence = (gradient * signs).flatten(1).sum(dim=1)               # [B]
        return torch.stack([v.detach(), broadcast_like(divergence, v).expand_as(v)])

    state = torch.stack([x0, torch.zeros_like(x0)])
    for t, s in itertools.pairwise(times):
        state = _rk4_step(slope, state, t, s)

    # log N(x_end; 0, prior_std²) + the integral, which is the same in all elements of an image
    x_end = state[0].flatten(1)                                             # [B, D]
    divergence_integral = state[1].flatten(1)[:, 0]                         # [B]
    log_constant = x_end.shape[1] * math.log(prior_std * math.sqrt(2 * math.pi))
    log_prior = -0.5 * (x_end / prior_std).square().sum(dim=1) - log_constant
    return log_prior + divergence_integral
