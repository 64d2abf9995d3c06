"""Rectified flow: straight paths from images to noise, and a network that predicts their velocity.

    x_t = (1 - t) x0 + t eps,    t in [0, 1]             a straight line from x0 to eps
    v = dx_t/dt = eps - x0                               its velocity
    L = E |v_hat(x_t, t) - (eps - x0)|²                  the loss; v_hat is the network

The network learns the mean velocity of all lines through x_t. Sampling starts from noise at
t = 1 and integrates dx/dt = v_hat down to t = 0.

(Liu et al., "Flow Straight and Fast", 2023, eq. 1; Lipman et al., "Flow Matching for Generative
Modeling", 2023. In these papers time runs from noise at 0 to data at 1; we follow Esser et al.,
"Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024.)

In the notation x_t = alpha_t x0 + sigma_t eps a flow has alpha_t = 1 - t and sigma_t = t, and

    x0 = x_t - t v_hat,    eps = x_t + (1 - t) v_hat

So a denoiser, (x_t, t) -> Prediction(x0, eps), is the same for a flow as for a Gaussian diffusion,
and guidance and clipping work for both. Euler's step from t to s < t is

    x_s = x_t + (s - t) v_hat = (1 - s) x0 + s eps

which is DDIM.

The file needs torch and, beside it, prediction.py, samplers.py and score_sde.py.

>>> flow = RectifiedFlow()
>>> def network(x_t, t, context, mask):
...     return torch.zeros_like(x_t)
>>> x0, t = torch.zeros(8, 3, 16, 16), torch.full((8,), 0.5)
>>> flow.loss(network, x0, t).shape
torch.Size([8])
>>> *_, last = flow_euler(flow.denoiser(network), shape=(2, 3, 16, 16), steps=5)
>>> last.index, last.t, last.x.shape
(4, 0.2, torch.Size([2, 3, 16, 16]))
"""

from collections.abc import Iterator

import torch

from .prediction import Denoiser, Prediction, broadcast_like, check_output, normal_noise
from .samplers import Step, initial_noise
from .score_sde import log_likelihood


class RectifiedFlow:
    """The loss of a rectified flow, and the conversion of the network's output to a Prediction.

    It takes the place of `GaussianDiffusion` in training; use it with `uniform_time` or
    `logit_normal_time`. Times are floats in [0, 1]; t = 1 is noise. The network receives 1000 t.
    """

    prediction_type = "velocity"

    def __len__(self) -> int:
        """The scale of the time that the network receives."""
        return 1000

    @property
    def schedule(self) -> "RectifiedFlow":
        """The flow itself: `guided` and `clipped` need `alpha_sigma` only."""
        return self

    def alpha_sigma(self, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t = 1 - t and sigma_t = t, each [B, 1, 1, ...], as in a NoiseSchedule.

        t: float [B] in [0, 1]; x: [B, ...].
        Raises ValueError for integer t.
        """
        if not t.is_floating_point():
            raise ValueError(
                "the times of a flow must be floats in [0, 1], "
                f"not {t.dtype}: train with timesteps=logit_normal_time"
            )
        t = broadcast_like(t.to(x), x)
        return 1 - t, t

    def add_noise(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x_t = (1 - t) x0 + t eps; x0, eps: [B, C, H, W], t: float [B]."""
        alpha_t, sigma_t = self.alpha_sigma(t, x0)
        return alpha_t * x0 + sigma_t * eps

    def loss(self, network, x0, t, context=None, mask=None, generator=None) -> torch.Tensor:
        """The loss |v_hat - (eps - x0)|² of each image, the mean over its elements, [B].

        network: (x_t, 1000 t, context, mask) -> velocity [B, C, H, W].
        x0: clean images [B, C, H, W] in [-1, 1], or latents.
        t: float [B] in [0, 1].
        context, mask: passed to the network; [B, L, D] and bool [B, L].
        generator: source of eps.

        Raises ValueError for integer t and for an output of another shape than x0.
        """
        eps = normal_noise(x0.shape, generator, x0.device, x0.dtype)
        velocity = network(self.add_noise(x0, t, eps), 1000 * t, context, mask)
        check_output(velocity, x0, channels=x0.shape[1])
        error = velocity.float() - (eps - x0).float()
        return error.square().flatten(1).mean(dim=1)

    def to_prediction(
        self, velocity: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> Prediction:
        """Convert the network's velocity [B, C, H, W] to a Prediction; t: float [B]."""
        check_output(velocity, x_t, channels=x_t.shape[1])
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        velocity = velocity.to(x_t.dtype)
        x0 = x_t - sigma_t * velocity
        eps = x_t + alpha_t * velocity
        return Prediction(x0, eps)

    def denoiser(self, network, context=None, mask=None) -> Denoiser:
        """The denoiser of a network: (x_t [B, C, H, W], t float [B]) -> Prediction.

        context: token embeddings [B, L, D], or [1, L, D] to use one caption for every image.
        mask: bool, [B, L] or [1, L]; True = a real token.
        """
        return Denoiser(network, self.to_prediction, context, mask, time_scale=1000)


def flow_euler(
    denoise, shape=None, steps: int = 50,
    generator=None, device="cpu", dtype=torch.float32, x_T=None,
) -> Iterator[Step]:
    """Sample a flow with Euler's method: steps of equal length, one network call per step.

    denoise: (x_t [B, C, H, W], t float [B]) -> Prediction.
    shape: (B, C, H, W) of the samples, unless x_T is given.
    steps: number of steps, 1 or more.
    generator: source of the initial noise; None = PyTorch's default generator.
    device, dtype: of the samples, if x_T is None.
    x_T: initial noise [B, C, H, W]; None = drawn from the generator.

    Yields `steps` Steps; Step.t is the time at which the step started, a float.
    """
    return _flow_loop(_euler_step, denoise, shape, steps, generator, device, dtype, x_T)


def flow_heun(
    denoise, shape=None, steps: int = 25,
    generator=None, device="cpu", dtype=torch.float32, x_T=None,
) -> Iterator[Step]:
    """Sample a flow with Heun's method, of second order.

    A step uses the mean of the velocities at its start and at the end of Euler's step. It needs
    two network calls; the last step is Euler's, so the network is never evaluated at t = 0.
    Arguments and Steps: as for `flow_euler`.
    """
    def heun_step(denoise, prediction, x_t, t, s):
        x_s = _euler_step(denoise, prediction, x_t, t, s)
        if s == 0:
            return x_s
        prediction_s = denoise(x_s, _full_time(s, x_s))
        # 2 · the mean velocity, v = eps - x0
        velocities = prediction.eps - prediction.x0 + prediction_s.eps - prediction_s.x0
        return x_t + (s - t) * velocities / 2

    return _flow_loop(heun_step, denoise, shape, steps, generator, device, dtype, x_T)


def _euler_step(denoise, prediction, x_t, t, s):
    """x_s = x_t + (s - t) v,  v = eps - x0."""
    return x_t + (s - t) * (prediction.eps - prediction.x0)


@torch.no_grad()
def _flow_loop(step, denoise, shape, steps, generator, device, dtype, x_T) -> Iterator[Step]:
    """Run a step function (denoise, prediction, x_t, t, s) -> x_s from t = 1 to t = 0."""
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")
    x = initial_noise(shape, generator, device, dtype, x_T)
    for index in range(steps):
        t = (steps - index) / steps
        s = (steps - index - 1) / steps
        prediction = denoise(x, _full_time(t, x))
        x = step(denoise, prediction, x, t, s)
        yield Step(index, t, x, prediction.x0)


def _full_time(t: float, x: torch.Tensor) -> torch.Tensor:
    """The time t for every image of x [B, C, H, W], as [B]."""
    return torch.full((len(x),), t, device=x.device, dtype=x.dtype)


def flow_log_likelihood(
    denoise, x0: torch.Tensor, steps: int = 100, generator=None, start: float = 0.0
) -> torch.Tensor:
    """log p(x0) of each image in nats, [B], by the ODE of the flow; see `log_likelihood`.

    denoise: (x_t [B, C, H, W], t float [B]) -> Prediction.
    x0: images [B, C, H, W].
    steps: number of Runge–Kutta steps from t = start to t = 1, where x is N(0, I).
    generator: source of the random signs that estimate the divergence.
    start: the time at which integration starts. Use 1e-3 for a denoiser that divides by sigma_t,
        as `clipped` does, since sigma_t is 0 at t = 0.
    """
    def velocity(x, t):
        prediction = denoise(x, t)
        return prediction.eps - prediction.x0

    return log_likelihood(
        velocity, x0, prior_std=1.0, start=start, end=1.0, steps=steps, generator=generator
    )
