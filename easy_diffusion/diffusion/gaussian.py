"""Prediction types, training losses and the variational bound.

A network sees x_t = alpha_t x0 + sigma_t eps and predicts one of three quantities. From each of
them x0 and eps follow:

    prediction_type="eps":   x0 = (x_t - sigma_t eps) / alpha_t
    prediction_type="x0":    eps = (x_t - alpha_t x0) / sigma_t
    prediction_type="v":     v = alpha_t eps - sigma_t x0
                             x0 = alpha_t x_t - sigma_t v,   eps = sigma_t x_t + alpha_t v

(Ho et al., "Denoising Diffusion Probabilistic Models", 2020, eq. 15; Salimans & Ho, "Progressive
Distillation for Fast Sampling of Diffusion Models", 2022, section 4 and appendix D.)

The loss is the squared error of the predicted quantity, L_simple (Ho et al. 2020, eq. 14). The
three squared errors differ only by a factor that depends on SNR = alpha_t² / sigma_t². With _hat
for the predicted quantities:

    |eps_hat - eps|² = SNR |x0_hat - x0|²,    |v_hat - v|² = (1 + SNR) |x0_hat - x0|²

So a loss weight that depends on the SNR turns the loss of one prediction type into another's.

The reverse step from x_t to x_{t-1} is Gaussian, too. Given x0 it is known (Ho et al. 2020, eq. 7):

    q(x_{t-1} | x_t, x0) = N(c_0 x0 + c_t x_t, beta_tilde_t I)
    c_0 = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t)
    c_t = sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
    beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)

The model p(x_{t-1} | x_t) uses the predicted x0 in the mean. Since x0 is uncertain, the right
variance lies between beta_tilde_t and beta_t (Ho et al. 2020, section 3.2; Nichol & Dhariwal,
"Improved Denoising Diffusion Probabilistic Models", 2021, eq. 15):

    variance="fixed_small":     beta_tilde_t            exact if the data is a single image
    variance="fixed_large":     beta_t                  exact if the data is N(0, I)
    variance="learned_range":   exp(w log beta_t + (1 - w) log beta_tilde_t)
                                w = (o + 1) / 2, o: the second half of the network's channels

L_simple does not depend on the variance. A learned variance is trained with the variational bound
on -log p(x0), in bits per dimension (Ho et al. 2020, eq. 5):

    L_vlb = KL(q(x_{T-1} | x0) || N(0, I))                              prior term
            + Σ_{t>0} KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))
            - log p(x0 | x_t at t = 0)                                  decoder term

(Our timesteps start at 0, so x_t at t = 0 is the paper's x_1.) The hybrid loss is
L_simple + λ L_vlb, where the gradient of L_vlb does not reach the mean (Nichol & Dhariwal 2021,
eq. 16).

The file needs torch and, beside it, prediction.py and schedule.py.

>>> from .schedule import NoiseSchedule
>>> schedule = NoiseSchedule.cosine(1000)
>>> diffusion = GaussianDiffusion(schedule, prediction_type="v", variance="learned_range")
>>> def network(x_t, t, context, mask):
...     return torch.zeros(len(x_t), 6, 16, 16)             # v and the variance, 3 channels each
>>> x0, t = torch.zeros(8, 3, 16, 16), torch.full((8,), 500)
>>> diffusion.loss(network, x0, t).shape
torch.Size([8])
>>> diffusion.denoiser(network)(x0, t).x0.shape
torch.Size([8, 3, 16, 16])
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .prediction import Denoiser, Prediction, broadcast_like, check_output, normal_noise
from .schedule import TimestepTable

PREDICTION_TYPES = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class BoundTerm(NamedTuple):
    """One term of the variational bound for each image, in bits per dimension.

    t: T for the prior term, T - 1 … 1 for the KL divergences, 0 for the decoder term.
    bits: [B].
    """

    t: int
    bits: torch.Tensor


class GaussianDiffusion:
    """A noise schedule, what the network predicts, the variance of the reverse step, and the loss.

    schedule: a NoiseSchedule.
    prediction_type: "eps", "x0" or "v".
    variance: "fixed_small", "fixed_large" or "learned_range".
    loss_weight: a function (snr [B], prediction_type) -> weights [B] of L_simple, for example
        `min_snr_weight` or `velocity_weight`; None = every weight is 1.
    vlb_weight: λ of the hybrid loss; used for variance="learned_range" only.

    Raises ValueError for an unknown prediction_type or variance, and for prediction_type="eps"
    with a schedule that ends in pure noise: there alpha_t = 0, and x0 does not follow from eps.
    """

    def __init__(
        self,
        schedule,
        prediction_type: str = "eps",
        variance: str = "fixed_small",
        loss_weight=None,
        vlb_weight: float = 1e-3,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}"
            )
        if variance not in VARIANCES:
            raise ValueError(f"variance must be {', '.join(VARIANCES)}, not {variance!r}")
        if prediction_type == "eps" and schedule.alpha_t[-1] == 0:
            raise ValueError(
                "this schedule ends in pure noise, where x0 cannot be computed from eps: "
                'use prediction_type="v" or "x0"'
            )
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.variance = variance
        self.loss_weight = loss_weight
        self.vlb_weight = vlb_weight

        # Everything below is computed in float64 [T] and kept as a table.
        betas, alpha_bar = schedule.betas, schedule.alpha_bar
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        self.snr = TimestepTable(alpha_bar / (1 - alpha_bar))

        # The coefficients c_0 and c_t of the posterior mean, and the posterior variance
        coef_x0 = alpha_bar_prev.sqrt() * betas / (1 - alpha_bar)
        coef_x_t = (1 - betas).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        self.posterior_coef_x0 = TimestepTable(coef_x0)
        self.posterior_coef_x_t = TimestepTable(coef_x_t)
        beta_tilde = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        # beta_tilde is 0 at t = 0; the value of t = 1 keeps its logarithm finite.
        beta_tilde[0] = beta_tilde[1] if len(betas) > 1 else betas[0]
        self.log_beta_tilde = TimestepTable(beta_tilde.log())
        self.log_beta = TimestepTable(betas.log())

    def __len__(self) -> int:
        """The number of timesteps T."""
        return len(self.schedule)

    def draw_noise(self, shape, generator=None, device="cpu", dtype=torch.float32) -> torch.Tensor:
        """eps of a shape, and x_T for sampling; arguments as for `normal_noise`."""
        return normal_noise(shape, generator, device, dtype)

    # ---------------------------------------------------------------- prediction types

    def add_noise(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x_t = alpha_t x0 + sigma_t eps; x0, eps: [B, C, H, W], t: int64 [B]."""
        alpha_t, sigma_t = self.schedule.alpha_sigma(t, x0)
        return alpha_t * x0 + sigma_t * eps

    def target(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """The quantity that the network is trained to predict, [B, C, H, W]."""
        if self.prediction_type == "eps":
            return eps
        if self.prediction_type == "x0":
            return x0
        alpha_t, sigma_t = self.schedule.alpha_sigma(t, x0)
        return alpha_t * eps - sigma_t * x0

    def to_prediction(
        self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> Prediction:
        """Convert the network's output to a Prediction.

        output: [B, C, H, W], or [B, 2C, H, W] with a learned variance.
        x_t: [B, C, H, W]; t: int64 [B].
        """
        output, variance_output = self._split_output(output.to(x_t.dtype), x_t)
        alpha_t, sigma_t = self.schedule.alpha_sigma(t, x_t)
        if self.prediction_type == "eps":
            eps = output
            x0 = (x_t - sigma_t * eps) / alpha_t
        elif self.prediction_type == "x0":
            x0 = output
            eps = (x_t - alpha_t * x0) / sigma_t
        else:
            v = output
            x0 = alpha_t * x_t - sigma_t * v
            eps = sigma_t * x_t + alpha_t * v
        return Prediction(x0, eps, self._log_variance(variance_output, x_t, t))

    def _log_variance(self, variance_output, x_t, t):
        """The log variance of the reverse step: [B, 1, 1, 1], or [B, C, H, W] if it is learned."""
        if self.variance == "fixed_small":
            return self.log_beta_tilde(t, x_t)
        if self.variance == "fixed_large":
            return self.log_beta(t, x_t)
        w = (variance_output + 1) / 2
        return w * self.log_beta(t, x_t) + (1 - w) * self.log_beta_tilde(t, x_t)

    def _split_output(self, output, x_t):
        """Split the channels into the predicted quantity and the output for the variance, or None.

        Raises ValueError for an output of a wrong shape.
        """
        learned = self.variance == "learned_range"
        check_output(output, x_t, channels=x_t.shape[1] * (2 if learned else 1))
        return output.chunk(2, dim=1) if learned else (output, None)

    def denoiser(self, network, context=None, mask=None) -> Denoiser:
        """The denoiser of a network: (x_t [B, C, H, W], t int64 [B]) -> Prediction.

        context: token embeddings [B, L, D], or [1, L, D] to use one caption for every image.
        mask: bool, [B, L] or [1, L]; True = a real token.
        """
        return Denoiser(network, self.to_prediction, context, mask)

    # ---------------------------------------------------------------- losses

    def loss(self, network, x0, t, context=None, mask=None, generator=None) -> torch.Tensor:
        """The training loss of each image, [B].

        It is loss_weight · L_simple, and with a learned variance vlb_weight · L_vlb is added.

        network: (x_t, t, context, mask) -> output.
        x0: clean images [B, C, H, W] in [-1, 1], or latents.
        t: int64 [B].
        context, mask: passed to the network; [B, L, D] and bool [B, L].
        generator: source of eps.
        """
        eps = self.draw_noise(x0.shape, generator, x0.device, x0.dtype)
        x_t = self.add_noise(x0, t, eps)
        output = network(x_t, t, context, mask)
        predicted, variance_output = self._split_output(output, x0)
        error = predicted.float() - self.target(x0, t, eps).float()
        loss = mean_per_sample(error.square())
        if self.loss_weight is not None:
            loss = loss * self.loss_weight(self.snr(t, loss), self.prediction_type)
        if variance_output is not None:
            # L_vlb trains the variance only: no gradient reaches the predicted mean.
            frozen_mean = torch.cat([predicted.detach(), variance_output], dim=1)
            prediction = self.to_prediction(frozen_mean, x_t, t)
            loss_vlb = len(self) * self.bound_term(x0, x_t, t, prediction)
            loss = loss + self.vlb_weight * loss_vlb
        return loss

    def vlb(self, network, x0, t, context=None, mask=None, generator=None) -> torch.Tensor:
        """An estimate of the variational bound from one timestep of each image, [B].

        It is T · L_t in bits per dimension. For uniform t its mean is L_vlb without the prior
        term, which does not depend on the network. The gradient reaches mean and variance.
        Arguments: as for `loss`. To train on the bound alone, set `diffusion.loss = diffusion.vlb`.
        """
        eps = self.draw_noise(x0.shape, generator, x0.device, x0.dtype)
        x_t = self.add_noise(x0, t, eps)
        output = network(x_t, t, context, mask)
        return len(self) * self.bound_term(x0, x_t, t, self.to_prediction(output, x_t, t))

    # ---------------------------------------------------------------- the variational bound

    def bound_term(
        self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, prediction: Prediction
    ) -> torch.Tensor:
        """The term L_t of the bound in bits per dimension, [B].

        For t > 0 it is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), for t = 0 the decoder term.
        """
        c_0 = self.posterior_coef_x0(t, x_t)
        c_t = self.posterior_coef_x_t(t, x_t)
        true_mean = c_0 * x0 + c_t * x_t
        mean = c_0 * prediction.x0 + c_t * x_t
        log_beta_tilde = self.log_beta_tilde(t, x_t)
        kl = gaussian_kl(true_mean, log_beta_tilde, mean, prediction.log_variance)
        decoder = -discretised_log_likelihood(x0, mean, prediction.log_variance)
        is_decoder_term = broadcast_like(t.to(x_t.device) == 0, x_t)        # [B, 1, 1, 1]
        nats = mean_per_sample(torch.where(is_decoder_term, decoder, kl))
        return nats / math.log(2)

    @torch.no_grad()
    def bits_per_dim(self, denoise, x0: torch.Tensor, generator=None) -> Iterator[BoundTerm]:
        """The complete variational bound on -log2 p(x0), term by term.

        denoise: a denoiser whose predictions have a log_variance.
        x0: images [B, C, H, W] of 256 grey levels; level g has the value g / 127.5 - 1.
        generator: source of the noise.

        Yields T + 1 BoundTerms, from the prior term, t = T, down to the decoder term, t = 0.
        Their sum is the bound in bits per dimension.
        """
        # The prior term: KL(N(alpha_t x0, sigma_t²) || N(0, 1)) at t = T - 1
        last_t = torch.full((len(x0),), len(self) - 1, device=x0.device)
        alpha_t, sigma_t = self.schedule.alpha_sigma(last_t, x0)
        zero = torch.zeros_like(x0)
        kl = gaussian_kl(alpha_t * x0, 2 * sigma_t.log(), zero, zero)
        yield BoundTerm(len(self), mean_per_sample(kl) / math.log(2))

        for timestep in reversed(range(len(self))):
            t = torch.full_like(last_t, timestep)
            eps = self.draw_noise(x0.shape, generator, x0.device, x0.dtype)
            x_t = self.add_noise(x0, t, eps)
            yield BoundTerm(timestep, self.bound_term(x0, x_t, t, denoise(x_t, t)))


def mean_per_sample(values: torch.Tensor) -> torch.Tensor:
    """The mean over all dimensions but the batch, [B, ...] → [B]."""
    return values.flatten(1).mean(dim=1)


def gaussian_kl(mean1, log_variance1, mean2, log_variance2) -> torch.Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) of each element, in nats."""
    return 0.5 * (
        log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2) - 1
        + (mean1 - mean2).square() * torch.exp(-log_variance2)
    )


def discretised_log_likelihood(x0, mean, log_variance) -> torch.Tensor:
    """The log probability of each element's grey level under N(mean, variance), in nats.

    It is the probability of an interval of width 2/255 around the element. The intervals of
    the lowest and the highest grey level extend to -∞ and ∞ (Ho et al. 2020, eq. 13).

    x0: grey levels in [-1, 1], any shape; mean, log_variance: tensors that broadcast to it.
    """
    normal_cdf = torch.special.ndtr
    inverse_std = torch.exp(-log_variance / 2)
    upper = normal_cdf((x0 + 1 / 255 - mean) * inverse_std)
    lower = normal_cdf((x0 - 1 / 255 - mean) * inverse_std)
    upper = torch.where(x0 > 1 - 1 / 255, torch.ones_like(upper), upper)
    lower = torch.where(x0 < -1 + 1 / 255, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def velocity_weight(
    snr: torch.Tensor, prediction_type: str, max_weight: float = 5.0
) -> torch.Tensor:
    """The loss weight that gives min(1 + SNR, max_weight) |x0_hat - x0|² for every prediction type.

    Without the limit this is the loss of v (Salimans & Ho 2022, section 4). 1 + SNR reaches
    thousands at the smallest t, which would dominate the loss; the limit is that of min-SNR.

    snr: [B]. Returns [B].
    """
    return (1 + snr).clamp(max=max_weight) / x0_error_ratio(snr, prediction_type)


def min_snr_weight(snr: torch.Tensor, prediction_type: str, gamma: float = 5.0) -> torch.Tensor:
    """The loss weight that gives min(SNR, gamma) |x0_hat - x0|² for every prediction type.

    It is 0 where the SNR is 0, so pure noise is not trained.

    snr: [B]. Returns [B].

    (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023, section 3.4.)
    """
    return snr.clamp(max=gamma) / x0_error_ratio(snr, prediction_type)


def x0_error_ratio(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """The squared error of the predicted quantity divided by that of x0: SNR, 1 or 1 + SNR."""
    ratios = {"eps": snr, "x0": torch.ones_like(snr), "v": 1 + snr}
    return ratios[prediction_type]
