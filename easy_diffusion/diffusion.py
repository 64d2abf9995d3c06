"""What the network is asked, and what its answer means.

A network sees a noisy picture x_t = signal x0 + noise ε and answers with one of three things, which say the same:

    predicts="noise":  ε̂,                           x0 = (x_t - noise ε̂) / signal
    predicts="x0":     x̂0,                          ε  = (x_t - signal x̂0) / noise
    predicts="v":      v̂ = signal ε - noise x0,     x0 = signal x_t - noise v̂,     ε = noise x_t + signal v̂

(Ho et al. 2020, eq. 9 and 11; Salimans & Ho, "Progressive Distillation", 2022, section 4 and appendix D.)
Training is a regression on that answer. `GaussianDiffusion` is the only place that knows which of the three it
is: samplers receive a denoiser, a function (x_t, t) -> Prediction, and never ask.

An error of the picture is the same error of v, only measured otherwise: |v̂ - v|² = (1 + SNR) |x̂0 - x0|², with
SNR = signal² / noise². So a loss can be weighted as if another question had been asked; `velocity_weight` does that.

The step back from x_t to x_{t-1} is a Gaussian, too. Its variance is known between two bounds (Ho et al. 2020, section 3.2):

    variance="fixed_small":  beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)     right if the data is one point
    variance="fixed_large":  beta_t                                               right if the data is N(0, I)

The file needs torch and, beside it, samplers.py (for two small things); its example also schedule.py.

>>> from .schedule import NoiseSchedule
>>> diffusion = GaussianDiffusion(NoiseSchedule.cosine(1000), predicts="v")
>>> network = lambda x_t, t, context, mask: torch.zeros_like(x_t)
>>> diffusion.loss(network, x0=torch.zeros(8, 3, 16, 16), t=torch.full((8,), 500)).shape
torch.Size([8])
>>> diffusion.denoiser(network)(torch.zeros(8, 3, 16, 16), torch.full((8,), 500)).x0.shape
torch.Size([8, 3, 16, 16])
"""

import torch

from .samplers import Prediction, normal_noise

PREDICTS = ("noise", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large")


class GaussianDiffusion:
    """A schedule, the meaning of the network's output, the variance of the step back, and the weight of the loss, a
    function of the signal-to-noise ratio [B] (default: all timesteps weigh alike).

    Raises ValueError for another `predicts` or `variance` than the module's docstring lists.
    """

    def __init__(self, schedule, predicts: str = "noise", variance: str = "fixed_small", loss_weight=None):
        if predicts not in PREDICTS:
            raise ValueError(f"predicts is one of {', '.join(PREDICTS)}, not {predicts!r}")
        if variance not in VARIANCES:
            raise ValueError(f"variance is one of {', '.join(VARIANCES)}, not {variance!r}")
        self.schedule, self.predicts, self.variance, self.loss_weight = schedule, predicts, variance, loss_weight
        self.snr = schedule.alphas_bar / (1 - schedule.alphas_bar)
        before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_bar[:-1]])
        small = schedule.betas * (1 - before) / (1 - schedule.alphas_bar)
        small[0] = small[min(1, len(small) - 1)]    # the last step adds no noise; this keeps its logarithm finite
        self.log_variances = (small if variance == "fixed_small" else schedule.betas).log()

    def add_noise(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t ~ q(x_t | x0): x0, noise [B, C, H, W], t int64 [B] → [B, C, H, W]."""
        signal, amount = self.schedule.signal_and_noise(t, x0)
        return signal * x0 + amount * noise

    def target(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the network should answer, [B, C, H, W]."""
        if self.predicts == "noise":
            return noise
        if self.predicts == "x0":
            return x0
        signal, amount = self.schedule.signal_and_noise(t, x0)
        return signal * noise - amount * x0

    def prediction(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        """The network's output [B, C, H, W] in words that a sampler understands."""
        output = output.to(x_t.dtype)
        signal, amount = self.schedule.signal_and_noise(t, x_t)
        if self.predicts == "noise":
            x0, noise = (x_t - amount * output) / signal, output
        elif self.predicts == "x0":
            x0, noise = output, (x_t - signal * output) / amount
        else:
            x0, noise = signal * x_t - amount * output, amount * x_t + signal * output
        log_variance = self.log_variances[t.cpu()].to(x_t).view(-1, *(1,) * (x_t.ndim - 1))
        return Prediction(x0, noise, log_variance)

    def loss(self, network, x0, t, context=None, mask=None, generator=None) -> torch.Tensor:
        """L_simple (Ho et al. 2020, eq. 14) of each picture, times the weight of its timestep, [B].

        x0 [B, C, H, W] in [-1, 1], t int64 [B], context [B, L, D] and mask bool [B, L] for the network.
        """
        noise = normal_noise(x0.shape, generator, x0.device, x0.dtype)
        output = network(self.add_noise(x0, t, noise), t, context, mask)
        error = output.float() - self.target(x0, t, noise).float()
        loss = error.square().mean(dim=tuple(range(1, error.ndim)))
        return loss if self.loss_weight is None else loss * self.loss_weight(self.snr[t.cpu()]).to(loss)

    def denoiser(self, network, context=None, mask=None):
        """The function (x_t [B, C, H, W], t int64 [B]) -> Prediction that samplers take.

        context [B, L, D] and mask [B, L] stay the same over all steps; a context of one caption serves any B.
        """
        def denoise(x_t, t):
            b = len(x_t)
            several = [c.expand(b, *c.shape[1:]) if c is not None and len(c) == 1 else c for c in (context, mask)]
            return self.prediction(network(x_t, t, *several), x_t, t)

        return denoise


def velocity_weight(snr: torch.Tensor, most: float = 5.0) -> torch.Tensor:
    """For predicts="x0": 1 + SNR, which makes it the loss of v, but not more than `most`, so that the last traces of noise,
    where 1 + SNR is thousands, do not outweigh all else (Salimans & Ho 2022, section 4; the bound is min-SNR's, Hang et al. 2023)."""
    return (1 + snr).clamp(max=most)


def logit_normal_timesteps(batch: int, steps: int, generator: torch.Generator, mean: float = 0.0, deviation: float = 1.2) -> torch.Tensor:
    """Training timesteps t = steps · sigmoid(N(mean, deviation²)): most often in the middle, where there is most to learn.

    (Esser et al., "Scaling Rectified Flow Transformers", 2024, section 3.1.) int64 [batch], where the generator lives.
    """
    normal = torch.randn(batch, generator=generator, device=generator.device)
    return (torch.sigmoid(mean + deviation * normal) * steps).long().clamp(max=steps - 1)
