"""What the network is asked, what its answer means, and what a wrong answer costs.

A network sees a noisy picture x_t = signal x0 + noise ε and answers with one of three things, which say the same:

    prediction_type="eps":  ε̂,                           x0 = (x_t - noise ε̂) / signal
    prediction_type="x0":     x̂0,                          ε  = (x_t - signal x̂0) / noise
    prediction_type="v":      v̂ = signal ε - noise x0,     x0 = signal x_t - noise v̂,     ε = noise x_t + signal v̂

(Ho et al. 2020, eq. 15; Salimans & Ho, "Progressive Distillation", 2022, section 4 and appendix D.)
`GaussianDiffusion` is the only place that knows which of the three it is: samplers receive a denoiser, a function
(x_t, t) -> Prediction, and never ask. Training is a regression on the answer, `loss`. An error of the picture is the same error of
the noise or of v, only measured otherwise: |ε̂ - ε|² = SNR |x̂0 - x0|² and |v̂ - v|² = (1 + SNR) |x̂0 - x0|², with
SNR = signal² / noise². So a weight that depends on the SNR turns one regression into another. (In the code the amount of noise
is `amount`, where ε has the name `noise`.)

The step back from x_t to x_{t-1} is a Gaussian, too; given x0 it is known (Ho et al. 2020, eq. 7):

    q(x_{t-1} | x_t, x0) = N(c0 x0 + c_t x_t, beta~),   beta~ = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)

The model does not know x0, so its variance is somewhat larger. Three choices (section 3.2; Nichol & Dhariwal 2021, eq. 15):

    variance="fixed_small":     beta~                                     right if the data is one point
    variance="fixed_large":     beta_t                                    right if the data is N(0, I)
    variance="learned_range":   exp(w log beta_t + (1 - w) log beta~)     w = (o + 1) / 2 from the output's second half o

L_simple says nothing about the variance; it learns from the variational bound on -log p(x0), in bits per dimension:

    L_vlb = KL(q(x_{T-1} | x0) || N(0, I))  +  Σ_{t>0} KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))  -  log p(x0 | x_{t=0})

(Ho et al. 2020, eq. 5; x_{t=0} is what x_1 is there, the picture with the least noise). The hybrid loss is L_simple + λ L_vlb, the
mean held fixed in the second term (Nichol & Dhariwal 2021, eq. 16). The file needs torch and, beside it, samplers.py (for two small
things); its example also schedule.py.

>>> from .schedule import NoiseSchedule
>>> diffusion = GaussianDiffusion(NoiseSchedule.cosine(1000), prediction_type="v", variance="learned_range")
>>> network = lambda x_t, t, context, mask: torch.zeros(len(x_t), 6, 16, 16)
>>> diffusion.loss(network, x0=torch.zeros(8, 3, 16, 16), t=torch.full((8,), 500)).shape
torch.Size([8])
>>> diffusion.denoiser(network)(torch.zeros(8, 3, 16, 16), torch.full((8,), 500)).x0.shape
torch.Size([8, 3, 16, 16])
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .prediction import Denoiser, Prediction, normal_noise

PREDICTION_TYPES = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class BoundTerm(NamedTuple):
    """A term of the bound: t = T is the prior's, t = 0 the decoder's, between them the KLs; bits per dimension [B]."""

    t: int
    bits: torch.Tensor


class GaussianDiffusion:
    """A schedule, the meaning of the network's output, the variance of the step back, and the loss: its weight, a function of
    the signal-to-noise ratio [B] and of `predicts` (default: all timesteps weigh alike), and λ = vlb_weight, used with a learned
    variance alone.

    Raises ValueError for another `predicts` or `variance` than the module's docstring lists, and for prediction_type="eps" with a
    schedule that ends in pure noise, from which no picture can be told.
    """

    def __init__(self, schedule, prediction_type: str = "eps", variance: str = "fixed_small", loss_weight=None, vlb_weight: float = 1e-3):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"predicts is one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}")
        if variance not in VARIANCES:
            raise ValueError(f"variance is one of {', '.join(VARIANCES)}, not {variance!r}")
        if prediction_type == "eps" and schedule.alpha_t[-1] == 0:
            raise ValueError('this schedule ends in pure noise, and noise less noise is no picture: use prediction_type="v" or "x0"')
        self.schedule, self.prediction_type, self.variance = schedule, prediction_type, variance
        self.loss_weight, self.vlb_weight = loss_weight, vlb_weight
        self.snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
        alphas_bar_before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar[:-1]])
        small = schedule.betas * (1 - alphas_bar_before) / (1 - schedule.alpha_bar)
        small[0] = small[1] if len(small) > 1 else schedule.betas[0]        # no noise is added there; this keeps its logarithm finite
        self.log_small, self.log_large = small.log(), schedule.betas.log()
        self.x0_factor = alphas_bar_before.sqrt() * schedule.betas / (1 - schedule.alpha_bar)                     # c0
        self.x_t_factor = (1 - schedule.betas).sqrt() * (1 - alphas_bar_before) / (1 - schedule.alpha_bar)        # c_t

    def __len__(self) -> int:
        return len(self.schedule)

    def add_noise(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t ~ q(x_t | x0): x0, noise [B, C, H, W], t int64 [B] → [B, C, H, W]."""
        signal, amount = self.schedule.alpha_sigma(t, x0)
        return signal * x0 + amount * noise

    def target(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the network should answer, [B, C, H, W]."""
        if self.prediction_type == "eps":
            return noise
        if self.prediction_type == "x0":
            return x0
        signal, amount = self.schedule.alpha_sigma(t, x0)
        return signal * noise - amount * x0

    def to_prediction(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        """The network's output, [B, C, H, W] or with a learned variance [B, 2C, H, W], in words that a sampler understands."""
        answer, fraction = self._split(output.to(x_t.dtype), x_t)
        signal, amount = self.schedule.alpha_sigma(t, x_t)
        if self.prediction_type == "eps":
            x0, noise = (x_t - amount * answer) / signal, answer
        elif self.prediction_type == "x0":
            x0, noise = answer, (x_t - signal * answer) / amount
        else:
            x0, noise = signal * x_t - amount * answer, amount * x_t + signal * answer
        if fraction is None:
            log_variance = extract(self.log_small if self.variance == "fixed_small" else self.log_large, t, x_t)
        else:
            w = (fraction + 1) / 2
            log_variance = w * extract(self.log_large, t, x_t) + (1 - w) * extract(self.log_small, t, x_t)
        return Prediction(x0, noise, log_variance)

    def _split(self, output, x_t):
        """The output's answer and, with a learned variance, its second half."""
        learned = self.variance == "learned_range"
        if output.shape[1] != x_t.shape[1] * (1 + learned):
            raise ValueError(f"variance={self.variance!r} needs a network of {x_t.shape[1] * (1 + learned)} output channels, "
                             f"not {output.shape[1]}")
        return output.chunk(2, dim=1) if learned else (output, None)

    def loss(self, network, x0, t, context=None, mask=None, generator=None) -> torch.Tensor:
        """L_simple (Ho et al. 2020, eq. 14) of each picture times the weight of its timestep; with a learned variance the
        hybrid loss, L_simple + λ L_vlb. [B]

        x0 [B, C, H, W] in [-1, 1], t int64 [B], context [B, L, D] and mask bool [B, L] for the network.
        """
        noise = normal_noise(x0.shape, generator, x0.device, x0.dtype)
        x_t = self.add_noise(x0, t, noise)
        output = network(x_t, t, context, mask)
        answer, fraction = self._split(output, x0)
        error = answer.float() - self.target(x0, t, noise).float()
        loss = mean_per_sample(error.square())
        if self.loss_weight is not None:
            loss = loss * self.loss_weight(self.snr[t.cpu()], self.prediction_type).to(loss)
        if fraction is not None:                                            # the bound moves the variance, not the mean
            frozen = torch.cat([answer.detach(), fraction], dim=1)
            loss = loss + self.vlb_weight * len(self) * self.bound_term(x0, x_t, t, self.to_prediction(frozen, x_t, t))
        return loss

    def vlb(self, network, x0, t, context=None, mask=None, generator=None) -> torch.Tensor:
        """An estimate of the bound from one term of each picture, T · L_t in bits per dimension, [B]: with t uniform its mean is
        L_vlb without the prior's term, which no network can change. The gradient reaches mean and variance. Arguments as `loss`;
        `diffusion.loss = diffusion.vlb` trains on the bound alone."""
        x_t = self.add_noise(x0, t, normal_noise(x0.shape, generator, x0.device, x0.dtype))
        return len(self) * self.bound_term(x0, x_t, t, self.to_prediction(network(x_t, t, context, mask), x_t, t))

    def bound_term(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, prediction: Prediction) -> torch.Tensor:
        """L_t in bits per dimension, [B]: KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), and at t = 0 -log p(x0 | x_{t=0})."""
        c0, c_t = extract(self.x0_factor, t, x_t), extract(self.x_t_factor, t, x_t)
        true_mean, mean = c0 * x0 + c_t * x_t, c0 * prediction.x0 + c_t * x_t
        kl = gaussian_kl(true_mean, extract(self.log_small, t, x_t), mean, prediction.log_variance)
        likelihood = discretised_log_likelihood(x0, mean, prediction.log_variance)
        first = (t == 0).view(-1, *(1,) * (x_t.ndim - 1))
        return mean_per_sample(torch.where(first, -likelihood, kl)) / math.log(2)

    @torch.no_grad()
    def bits_per_dim(self, denoise, x0: torch.Tensor, generator=None) -> Iterator[BoundTerm]:
        """The whole bound on -log2 p(x0) of pictures of 256 grey levels, term by term, from t = T, the prior, down to t = 0, the
        decoder: T + 1 BoundTerms, whose bits add up to bits per dimension.

        denoise as samplers take it, its log_variance set; x0 [B, C, H, W], grey level g at g / 127.5 - 1.
        """
        last = torch.full((len(x0),), len(self) - 1, device=x0.device)
        signal, amount = self.schedule.alpha_sigma(last, x0)
        zero = torch.zeros_like(x0)
        yield BoundTerm(len(self), mean_per_sample(gaussian_kl(signal * x0, 2 * amount.log(), zero, zero)) / math.log(2))
        for step in reversed(range(len(self))):
            t = torch.full_like(last, step)
            x_t = self.add_noise(x0, t, normal_noise(x0.shape, generator, x0.device, x0.dtype))
            yield BoundTerm(step, self.bound_term(x0, x_t, t, denoise(x_t, t)))

    def denoiser(self, network, context=None, mask=None):
        """The function (x_t [B, C, H, W], t int64 [B]) -> Prediction that samplers take.

        context [B, L, D] and mask [B, L] stay the same over all steps; a context of one caption serves any B.
        """
        return Denoiser(network, self.to_prediction, context, mask)


def extract(values: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """values [T] at timesteps t [B], as [B, 1, 1, ...], ready to meet `like` [B, ...]."""
    return values[t.cpu()].to(like).view(-1, *(1,) * (like.ndim - 1))


def mean_per_sample(values: torch.Tensor) -> torch.Tensor:
    """Mean over all but the batch: [B, ...] → [B]."""
    return values.flatten(1).mean(dim=1)


def gaussian_kl(mean1, log_variance1, mean2, log_variance2) -> torch.Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) of each number, in nats."""
    return 0.5 * (log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2) - 1
                  + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_log_likelihood(x0, mean, log_variance) -> torch.Tensor:
    """log of the probability that N(mean, variance) gives to the grey level of each number of x0, in nats (Ho et al. 2020,
    eq. 13): the mass of a bin of width 2/255 around it, the outermost bins reaching to infinity."""
    standard = torch.distributions.Normal(0.0, 1.0)
    scale = torch.exp(-log_variance / 2)
    upper, lower = standard.cdf((x0 + 1 / 255 - mean) * scale), standard.cdf((x0 - 1 / 255 - mean) * scale)
    upper = torch.where(x0 > 1 - 1 / 255, torch.ones_like(upper), upper)
    lower = torch.where(x0 < -1 + 1 / 255, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def velocity_weight(snr: torch.Tensor, prediction_type: str, most: float = 5.0) -> torch.Tensor:
    """The weight that makes the loss that of v, 1 + SNR times the squared error of x0, but not more than `most` times, so that the
    last traces of noise, where 1 + SNR is thousands, do not outweigh all else (Salimans & Ho 2022, section 4; the bound is min-SNR's)."""
    return (1 + snr).clamp(max=most) / x0_error_ratio(snr, prediction_type)


def min_snr_weight(snr: torch.Tensor, prediction_type: str, gamma: float = 5.0) -> torch.Tensor:
    """The weight that makes the loss, whatever is predicted, min(SNR, γ) times the squared error of x0 (Hang et al., "Efficient
    Diffusion Training via Min-SNR Weighting Strategy", 2023, section 3.4). It is 0 where there is no signal at all."""
    return snr.clamp(max=gamma) / x0_error_ratio(snr, prediction_type)


def x0_error_ratio(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """How many times the squared error of x0 the squared error of the answer is: SNR, 1 or 1 + SNR."""
    return {"eps": snr, "x0": torch.ones_like(snr), "v": 1 + snr}[prediction_type]
