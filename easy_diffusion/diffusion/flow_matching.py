"""Rectified flow: straight lines from picture to noise, and a network that learns their velocity.

    x_t = (1 - t) x0 + t ε,   t in [0, 1]                   the path: a straight line
    v = dx_t/dt = ε - x0                                    its velocity
    L = E |v̂(x_t, t) - (ε - x0)|²                           what the network learns: the mean velocity of all lines through x_t

(Liu et al., "Flow Straight and Fast", 2023, eq. 1; Lipman et al., "Flow Matching for Generative Modeling", 2023; their time runs the
other way, from noise at 0 to data at 1; ours is that of Esser et al. 2024.) To sample,
start at noise, t = 1, and follow dx/dt = v̂ to t = 0. It is diffusion in other clothes: signal = 1 - t, noise = t, and

    x0 = x_t - t v̂,   ε = x_t + (1 - t) v̂

so a denoiser is a function (x_t, t) -> Prediction(x0, noise) here as there, and `guided` and `clipped` take it as it is. Euler's
step from t to s, x_s = x_t + (s - t) v̂, is in these words x_s = (1 - s) x0 + s ε, which is DDIM. The file needs torch and,
beside it, samplers.py and score_sde.py (for small things).

>>> flow = RectifiedFlow()
>>> network = lambda x_t, t, context, mask: torch.zeros_like(x_t)
>>> flow.loss(network, torch.zeros(8, 3, 16, 16), t=torch.full((8,), 0.5)).shape
torch.Size([8])
>>> *_, last = euler(flow.denoiser(network), shape=(2, 3, 16, 16), steps=5)
>>> last.index, last.t, tuple(last.x.shape)
(4, 0.2, (2, 3, 16, 16))
"""

from collections.abc import Iterator

import torch

from .prediction import Denoiser, Prediction, broadcast_like, normal_noise
from .samplers import Step, initial_noise
from .score_sde import log_likelihood


class RectifiedFlow:
    """What diffusion.py's GaussianDiffusion is to diffusion: the loss, and the meaning of the network's output.

    Times are floats in [0, 1], 1 is noise; the network, the same UNet, sees its time as 1000 t. Trained by train.py with
    timesteps=uniform_time (score_sde.py) or logit_normal_time.
    """

    prediction_type = "velocity"

    def __len__(self) -> int:
        return 1000

    @property
    def schedule(self) -> "RectifiedFlow":
        """A flow is its own schedule."""
        return self

    def alpha_sigma(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """1 - t and t, each [B, 1, 1, ...]; so a flow takes a schedule's place in `clipped` and `guided`. ValueError for whole t."""
        if not t.is_floating_point():
            raise ValueError(f"the times of a flow are float in [0, 1], not {t.dtype}: train with timesteps=logit_normal_time")
        t = broadcast_like(t.to(like), like)
        return 1 - t, t

    def add_noise(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t on the line from x0 to noise: x0, noise [B, C, H, W], t float [B]."""
        signal, amount = self.alpha_sigma(t, x0)
        return signal * x0 + amount * noise

    def loss(self, network, x0, t, context=None, mask=None, generator=None) -> torch.Tensor:
        """|v̂ - (ε - x0)|² of each picture, mean over its numbers, [B]. x0 [B, C, H, W] in [-1, 1], t float [B] in [0, 1]."""
        noise = normal_noise(x0.shape, generator, x0.device, x0.dtype)
        velocity = network(self.add_noise(x0, t, noise), 1000 * t, context, mask)
        if velocity.shape != x0.shape:
            raise ValueError(f"the network answers with {tuple(velocity.shape)} to pictures of {tuple(x0.shape)}")
        return (velocity.float() - (noise - x0).float()).square().flatten(1).mean(dim=1)

    def to_prediction(self, velocity: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        """The network's velocity [B, C, H, W] in words that a sampler understands."""
        signal, amount = self.alpha_sigma(t, x_t)
        velocity = velocity.to(x_t.dtype)
        return Prediction(x_t - amount * velocity, x_t + signal * velocity)

    def denoiser(self, network, context=None, mask=None):
        """The function (x_t [B, C, H, W], t float [B]) -> Prediction; a context of one caption serves any B."""
        return Denoiser(network, self.to_prediction, context, mask, time_scale=1000)


def flow_euler(denoise, shape=None, steps: int = 50, generator=None, device="cpu", dtype=torch.float32, x_T=None) -> Iterator[Step]:
    """From noise to picture by Euler's steps of equal length, one network call each; yields `steps` Steps, whose t is the time
    they left. shape (B, C, H, W), or x_T, the noise to start from."""
    return _flow_loop(_euler_step, denoise, shape, steps, generator, device, dtype, x_T)


def flow_heun(denoise, shape=None, steps: int = 25, generator=None, device="cpu", dtype=torch.float32, x_T=None) -> Iterator[Step]:
    """The same with Heun's steps of second order: the mean of the velocities at both ends, two network calls a step and one in the
    last (t = 0 is never asked)."""
    def step(denoise, prediction, x, t, s):
        x_s = _euler_step(denoise, prediction, x, t, s)
        if s == 0:
            return x_s
        again = denoise(x_s, torch.full((len(x),), s, device=x.device, dtype=x.dtype))
        return x + (s - t) * (prediction.eps - prediction.x0 + again.eps - again.x0) / 2

    return _flow_loop(step, denoise, shape, steps, generator, device, dtype, x_T)


def _euler_step(denoise, prediction, x, t, s):
    return x + (s - t) * (prediction.eps - prediction.x0)


@torch.no_grad()
def _flow_loop(step, denoise, shape, steps, generator, device, dtype, x_T) -> Iterator[Step]:
    if steps < 1:
        raise ValueError(f"steps is 1 or more, not {steps}")
    x = initial_noise(shape, generator, device, dtype, x_T)
    for index in range(steps):
        t, s = (steps - index) / steps, (steps - index - 1) / steps
        prediction = denoise(x, torch.full((len(x),), t, device=x.device, dtype=x.dtype))
        x = step(denoise, prediction, x, t, s)
        yield Step(index, t, x, prediction.x0)


def flow_log_likelihood(denoise, x0: torch.Tensor, steps: int = 100, generator=None, start: float = 0.0) -> torch.Tensor:
    """log p(x0) of each picture in nats, [B], by the flow's own ODE from t = start to noise, N(0, I); see score_sde.py. A denoiser
    that divides by the noise, as `clipped` does, has no answer at t = 0: give it a start of 1e-3."""
    def velocity(x, t):
        prediction = denoise(x, t)
        return prediction.eps - prediction.x0

    return log_likelihood(velocity, x0, prior_std=1.0, start=start, end=1.0, steps=steps, generator=generator)
