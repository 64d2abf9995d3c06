"""Diffusion in continuous time: the variance-exploding SDE, its reversal, and the ODE that gives likelihoods.

Let a picture walk at random, faster and faster, for a time t from 0 to 1, and never shrink:

    dx = g(t) dw,   g(t) = σ^t                             the diffusion coefficient
    x_t ~ N(x0, s(t)² I),   s(t)² = (σ^2t - 1) / (2 ln σ)   the marginal: s² grows by g² dt

Run backwards in time, the walk is again an SDE, and all that must be known is the score ∇ log p_t(x), the direction in
which pictures become more likely; and an ordinary differential equation has the same marginals p_t:

    dx = -g² ∇log p_t(x) dt + g dw     (t falls)            the reverse SDE       (Anderson 1982)
    dx/dt = -½ g² ∇log p_t(x)                               the probability flow  (Song et al. 2021, eq. 13)

(Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021.) The score of
x_t = x0 + s z is -z / s on average, so it is learned as denoising is: E |s · score(x_t, t) + z|² is least at the true
score (Vincent 2011; Song et al. 2021, eq. 7). The flow carries density as a liquid: along it d/dt log p_t(x_t) = -div(dx/dt), so that
integrating the divergence from x0 to x_1 gives log p(x0) (eq. 39). t is a float in [ε, 1]: at t = 0 the score may be infinite.

The file needs nothing but torch.

>>> sde = VarianceExploding(sigma=25.0)
>>> score = lambda x, t: -x / (0.25 + sde.marginal_std(t).view(-1, 1) ** 2)            # data of N(0, 0.5²)
>>> *_, last = euler_maruyama(score, sde, shape=(2000, 1), steps=200, generator=torch.Generator().manual_seed(0))
>>> bool(0.45 < last.mean.std() < 0.55)
True
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .prediction import broadcast_like, normal_noise


class SDEStep(NamedTuple):
    """One step of a solver: its number from 0, the time it reached, x there, and its mean, x without the last noise."""

    index: int
    t: float
    x: torch.Tensor
    mean: torch.Tensor


class VarianceExploding:
    """dx = σ^t dw for t in [0, 1]; sigma > 1. The last marginal is N(x0, s(1)²), s(1) = 9.8 for sigma = 25.

    Trained by train.py: `loss`, and timesteps=uniform_time. The network sees its time as 1000 t.
    """

    prediction_type = "score"

    def __init__(self, sigma: float = 25.0):
        if sigma <= 1:
            raise ValueError(f"sigma is more than 1, so that the noise grows, not {sigma}")
        self.sigma = sigma

    def __len__(self) -> int:
        return 1000

    def marginal_std(self, t: torch.Tensor) -> torch.Tensor:
        """s(t), the standard deviation of x_t given x0; t of any shape."""
        return torch.sqrt(torch.expm1(2 * t * math.log(self.sigma)) / (2 * math.log(self.sigma)))

    def diffusion_coefficient(self, t: torch.Tensor) -> torch.Tensor:
        """g(t) = σ^t."""
        return self.sigma ** t

    def score(self, network, context=None, mask=None):
        """The function (x [B, ...], t float [B]) -> score [B, ...] that solvers take: the network's output over s(t).

        So the network need only answer with numbers of about 1, whatever the noise. It is shown x / sqrt(1 + s²), likewise.
        """
        def score_of_network(x, t):
            s = broadcast_like(self.marginal_std(t), x)
            return network(x / torch.sqrt(1 + s ** 2), 1000 * t, context, mask).to(x.dtype) / s

        return score_of_network

    def loss(self, network, x0, t, context=None, mask=None, generator=None) -> torch.Tensor:
        """E |s · score + z|² of each picture, mean over its numbers, [B] (Song et al. 2021, eq. 7, weighted by s²).

        x0 [B, C, H, W], t float [B] in (0, 1].
        """
        if not t.is_floating_point():
            raise ValueError(f"the times of an SDE are float in (0, 1], not {t.dtype}: train with timesteps=uniform_time")
        z = normal_noise(x0.shape, generator, x0.device, x0.dtype)
        s = broadcast_like(self.marginal_std(t).to(x0.dtype), x0)
        score = self.score(network, context, mask)(x0 + s * z, t.to(x0.dtype))
        return (s * score + z).float().square().flatten(1).mean(dim=1)


@torch.no_grad()
def euler_maruyama(score, sde, shape, steps: int = 500, least: float = 1e-3, generator=None, device="cpu",
                   dtype=torch.float32) -> Iterator[SDEStep]:
    """The reverse SDE by Euler's steps: x ← x + g² score dt + g sqrt(dt) z. Yields `steps` SDESteps; the last one's mean is
    the sample. shape (B, ...) of the pictures; least: the time at which it stops."""
    x, times = _start(sde, shape, steps, least, generator, device, dtype)
    for index, (t, s) in enumerate(zip(times, times[1:])):
        x, mean = _reverse_step(score, sde, x, t, s, generator)
        yield SDEStep(index, float(s), x, mean)


@torch.no_grad()
def predictor_corrector(score, sde, shape, steps: int = 500, snr: float = 0.16, corrections: int = 1, least: float = 1e-3,
                        generator=None, device="cpu", dtype=torch.float32) -> Iterator[SDEStep]:
    """Before each step of the reverse SDE some of Langevin's, at the same t, which mend what the last step got wrong (Song et
    al. 2021, algorithm 4; there the correction follows the step, here the step is last, so that its mean is free of noise).
    snr as in `langevin_step`, otherwise as `euler_maruyama`."""
    x, times = _start(sde, shape, steps, least, generator, device, dtype)
    for index, (t, s) in enumerate(zip(times, times[1:])):
        for _ in range(corrections):
            x = langevin_step(score, x, t, snr, generator)
        x, mean = _reverse_step(score, sde, x, t, s, generator)
        yield SDEStep(index, float(s), x, mean)


def langevin_step(score, x, t, snr: float, generator=None) -> torch.Tensor:
    """x [B, ...] → x + e score + sqrt(2 e) z, which pulls x to p_t wherever it is. snr: how large the score's part is beside the
    noise's, which sets e = 2 (snr |z| / |score|)², the norms being means over the batch. t: a tensor of one time."""
    gradient, z = score(x, t.expand(len(x))), normal_noise(x.shape, generator, x.device, x.dtype)
    length_z, length_gradient = (v.flatten(1).norm(dim=1).mean() for v in (z, gradient))
    e = 2 * (snr * length_z / length_gradient) ** 2
    return x + e * gradient + torch.sqrt(2 * e) * z


def _start(sde, shape, steps, least, generator, device, dtype):
    """Noise as wide as the last marginal, and steps + 1 times from 1 down to `least`."""
    if steps < 1 or not 0 < least < 1:
        raise ValueError(f"at least one step, from t = 1 down to least in (0, 1); not steps={steps}, least={least}")
    times = torch.linspace(1, least, steps + 1, device=device, dtype=dtype)
    return sde.marginal_std(times[0]) * normal_noise(shape, generator, device, dtype), times


def _reverse_step(score, sde, x, t, s, generator):
    """One step of the reverse SDE from t down to s: (x_s, its mean)."""
    g, dt = sde.diffusion_coefficient(t), t - s
    mean = x + g ** 2 * score(x, t.expand(len(x))) * dt
    return mean + g * torch.sqrt(dt) * normal_noise(x.shape, generator, x.device, x.dtype), mean


def probability_flow(score, sde):
    """The velocity dx/dt = -½ g² score of the ODE with the SDE's marginals, a function (x [B, ...], t float [B]) → [B, ...]."""
    return lambda x, t: -0.5 * broadcast_like(sde.diffusion_coefficient(t) ** 2, x) * score(x, t)


@torch.no_grad()
def integrate_ode(velocity, x: torch.Tensor, start: float, end: float, steps: int = 100) -> Iterator[SDEStep]:
    """x carried along dx/dt = velocity(x, t) from time `start` to `end`, forwards or backwards, by Runge and Kutta's method of fourth
    order: four network calls a step. Yields `steps` SDESteps. For samples: from 1 to 1e-3, x of N(0, s(1)²)."""
    times = _times(start, end, steps, x)
    for index, (t, s) in enumerate(zip(times, times[1:])):
        x = _rk4_step(lambda x, t: velocity(x, t.expand(len(x))), x, t, s)
        yield SDEStep(index, float(s), x, x)


def _times(start, end, steps, like):
    if steps < 1:
        raise ValueError(f"at least one step, not steps={steps}")
    return torch.linspace(start, end, steps + 1, device=like.device, dtype=like.dtype)


def _rk4_step(slope, x, t, s):
    """One step of fourth order from t to s; slope(x, t) of the same shape as x."""
    h, middle = s - t, (t + s) / 2
    k1 = slope(x, t)
    k2 = slope(x + h / 2 * k1, middle)
    k3 = slope(x + h / 2 * k2, middle)
    k4 = slope(x + h * k3, s)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def log_likelihood(velocity, x0: torch.Tensor, prior_std: float, start: float = 1e-3, end: float = 1.0, steps: int = 100,
                   generator=None) -> torch.Tensor:
    """log p(x0) of each picture, in nats, [B]: x0 carried along the ODE to `end`, where it is N(0, prior_deviation²), and the
    divergence gathered on the way: log p(x0) = log N(x_end) + ∫ div velocity dt.

    The divergence is estimated as eᵀ ∂v/∂x e with random signs e (Skilling 1989; Hutchinson 1990; Song et al. 2021, eq. 40):
    unbiased, and exact where coordinates do not mix. The steps are of equal length in t, and the score turns fastest near `start`,
    above all between narrow heaps: take more of them until the figure stands still.
    Bits per dimension: -log p / (D ln 2), and for pictures of 256 grey levels spread over [-1, 1] + log2(127.5); for a fair figure
    add noise of one level's width first, uniform in ±1/255, since a density may pile up on the levels without end.
    """
    source = generator.device if generator is not None else x0.device
    signs = torch.randint(2, x0.shape, generator=generator, device=source).to(x0) * 2 - 1
    times = _times(start, end, steps, x0)

    def slope(state, t):
        with torch.enable_grad():
            x = state[0].detach().requires_grad_(True)
            v = velocity(x, t.expand(len(x)))
            along, = torch.autograd.grad((v * signs).sum(), x)
        divergence = (along * signs).flatten(1).sum(dim=1)
        return torch.stack([v.detach(), broadcast_like(divergence, v).expand_as(v)])      # both in one state, [2, B, ...]

    state = torch.stack([x0, torch.zeros_like(x0)])
    for t, s in zip(times, times[1:]):
        state = _rk4_step(slope, state, t, s)
    x, gathered = state[0].flatten(1), state[1].flatten(1)[:, 0]
    normal = -0.5 * (x / prior_std).square().sum(dim=1) - x.shape[1] * math.log(prior_std * math.sqrt(2 * math.pi))
    return normal + gathered
