"""The variational bound of gaussian.py."""

import math

import pytest
import torch

from easy_diffusion.diffusion.gaussian import (
    GaussianDiffusion,
    discretised_log_likelihood,
    gaussian_kl,
)
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.schedule import NoiseSchedule

from .test_gaussian import COSINE, LINEAR, random_images

MEAN, STD = 0.1, 0.25                       # the data: elements of N(MEAN, STD²)


def make_optimal_denoiser(schedule):
    """The exact denoiser of the data, and the true variances of the reverse step, [T].

    Var(x_{t-1} | x_t) = beta_tilde + c_0² Var(x0 | x_t)
    """
    alpha_t, sigma_t = schedule.alpha_t, schedule.sigma_t
    alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar[:-1]])
    beta_tilde = schedule.betas * (1 - alpha_bar_prev) / (1 - schedule.alpha_bar)
    variance_of_x0 = STD ** 2 * sigma_t ** 2 / (alpha_t ** 2 * STD ** 2 + sigma_t ** 2)
    coef_x0 = GaussianDiffusion(schedule).posterior_coef_x0.values
    variance = beta_tilde + coef_x0 ** 2 * variance_of_x0

    def denoise(x_t, t):
        alpha_t, sigma_t = schedule.alpha_sigma(t, x_t)
        gain = alpha_t * STD ** 2 / (alpha_t ** 2 * STD ** 2 + sigma_t ** 2)
        x0 = MEAN + gain * (x_t - alpha_t * MEAN)
        eps = (x_t - alpha_t * x0) / sigma_t
        return Prediction(x0, eps, variance[t].log().view(-1, 1, 1, 1))

    return denoise, variance


def random_grey_levels(count, seed=0):
    """Data rounded to 256 grey levels, [count, 1, 4, 4]."""
    generator = torch.Generator().manual_seed(seed)
    x = MEAN + STD * torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def sum_of_bits(terms):
    return float(sum(term.bits.mean() for term in terms))


def test_gaussian_kl_equals_torch():
    p = torch.distributions.Normal(torch.tensor(0.3), torch.tensor(0.7))
    q = torch.distributions.Normal(torch.tensor(-0.1), torch.tensor(1.3))
    kl = gaussian_kl(p.loc, 2 * p.scale.log(), q.loc, 2 * q.scale.log())
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q))


def test_the_probabilities_of_all_grey_levels_sum_to_1():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.0, 0.5), (0.93, 0.1), (-1.4, 0.3), (0.2, 0.004)):
        log_variance = torch.tensor(2 * math.log(std)).double()
        log_p = discretised_log_likelihood(levels, torch.tensor(mean), log_variance)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
        if std == 0.5:                      # wide: the density times the width of an interval
            log_density = torch.distributions.Normal(mean, std).log_prob(levels[100:110])
            expected = log_density + math.log(2 / 255)
            torch.testing.assert_close(log_p[100:110], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "schedule",
    [LINEAR, COSINE, NoiseSchedule.cosine(50), NoiseSchedule.linear(100)],
    ids=["linear", "cosine", "50 timesteps", "ends far from pure noise"],
)
def test_bits_per_dim_of_the_optimal_model_is_the_entropy_plus_the_prior_term(schedule):
    """The entropy of the grey levels is log2(sqrt(2πe) STD 127.5) = 7.04 bits.

    With the true reverse steps the bound is tight except for the prior term,
    KL(q(x_{T-1}) || N(0, I)).
    """
    denoise, _ = make_optimal_denoiser(schedule)
    generator = torch.Generator().manual_seed(1)
    x0 = random_grey_levels(2000)
    terms = list(GaussianDiffusion(schedule).bits_per_dim(denoise, x0, generator=generator))
    assert [term.t for term in terms] == list(range(len(schedule), -1, -1))
    assert terms[0].bits.shape == (2000,)

    entropy = math.log2(math.sqrt(2 * math.pi * math.e) * STD * 127.5)
    alpha_t, sigma_t = float(schedule.alpha_t[-1]), float(schedule.sigma_t[-1])
    std = math.sqrt(alpha_t ** 2 * STD ** 2 + sigma_t ** 2)
    marginal = torch.distributions.Normal(alpha_t * MEAN, std)
    standard_normal = torch.distributions.Normal(0.0, 1.0)
    prior = float(torch.distributions.kl_divergence(marginal, standard_normal)) / math.log(2)
    # 32,000 values: a standard error of 1 / (sqrt(2 · 32,000) ln 2) = 0.006
    assert sum_of_bits(terms) == pytest.approx(entropy + prior, abs=0.02)
    if len(schedule) == 100:
        assert prior > 0.05


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_true_variance_has_the_best_bound(variance):
    schedule = NoiseSchedule.cosine(50)
    denoise_optimal, _ = make_optimal_denoiser(schedule)
    diffusion = GaussianDiffusion(schedule, "x0", variance)

    def network(x_t, t, context, mask):
        return denoise_optimal(x_t, t).x0

    def compute_bits(denoise):
        generator = torch.Generator().manual_seed(1)
        return sum_of_bits(diffusion.bits_per_dim(denoise, random_grey_levels(500), generator))

    assert compute_bits(diffusion.denoiser(network)) > compute_bits(denoise_optimal) + 0.02


def test_vlb_at_random_timesteps_has_the_mean_of_the_complete_bound():
    schedule, x0 = NoiseSchedule.cosine(50), random_grey_levels(20_000)
    denoise, variance = make_optimal_denoiser(schedule)
    diffusion = GaussianDiffusion(schedule, "x0", "learned_range")
    log_range = diffusion.log_beta.values - diffusion.log_beta_tilde.values
    w = (variance.log() - diffusion.log_beta_tilde.values) / log_range                      # [T]
    variance_output = 2 * w - 1

    def network(x_t, t, context, mask):
        second_half = variance_output[t].view(-1, 1, 1, 1).expand_as(x_t)
        return torch.cat([denoise(x_t, t).x0, second_half], dim=1)

    generator = torch.Generator().manual_seed(2)
    denoise_learned = diffusion.denoiser(network)
    prior, *terms = diffusion.bits_per_dim(denoise_learned, x0[:2000], generator=generator)
    bound = sum_of_bits(terms)
    t = torch.randint(50, (20_000,), generator=generator)
    estimate = diffusion.vlb(network, x0, t, generator=generator)
    standard_error = float(estimate.std()) / 20_000 ** 0.5
    assert float(estimate.mean()) == pytest.approx(bound, abs=4 * standard_error)
    assert float(prior.bits.mean()) < 0.01


def test_the_learned_variance_converges_to_the_true_variance():
    """One parameter per timestep, trained with the hybrid loss and the optimal mean."""
    schedule = NoiseSchedule.cosine(20)
    denoise, true_variance = make_optimal_denoiser(schedule)
    diffusion = GaussianDiffusion(schedule, "x0", "learned_range", vlb_weight=1.0)
    variance_output = torch.zeros(20, dtype=torch.float64, requires_grad=True)

    def network(x_t, t, context, mask):
        second_half = variance_output[t].view(-1, 1, 1, 1).expand_as(x_t)
        return torch.cat([denoise(x_t, t).x0, second_half], dim=1)

    optimizer = torch.optim.Adam([variance_output], lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(400) % 20
    for step in range(300):
        noise = torch.randn(400, 1, 4, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = diffusion.loss(network, MEAN + STD * noise, t, generator=generator)
        loss.mean().backward()
        optimizer.step()
        scheduler.step()

    w = (variance_output.detach() + 1) / 2
    learned = (w * diffusion.log_beta.values + (1 - w) * diffusion.log_beta_tilde.values).exp()
    # At t = 0 the best variance is another: it includes the width of a grey level.
    torch.testing.assert_close(learned[1:], true_variance[1:], rtol=0.05, atol=0)


def test_the_bound_in_the_hybrid_loss_trains_the_variance_but_not_the_mean():
    x0, t = random_images(0), torch.tensor([0, 1, 200, 500, 900, 999])

    def compute_gradients(vlb_weight):
        generator = torch.Generator().manual_seed(4)
        output = torch.randn(6, 6, 8, 8, generator=generator, dtype=torch.float64)
        output.requires_grad_(True)
        diffusion = GaussianDiffusion(LINEAR, "eps", "learned_range", vlb_weight=vlb_weight)
        generator = torch.Generator().manual_seed(5)
        diffusion.loss(lambda *_: output, x0, t, generator=generator).sum().backward()
        return output.grad.chunk(2, dim=1)

    mean_without, variance_without = compute_gradients(0.0)
    mean_with, variance_with = compute_gradients(1000.0)
    assert torch.equal(mean_with, mean_without)
    assert not variance_without.any()
    assert variance_with.flatten(1).norm(dim=1).min() > 0


def test_the_hybrid_loss_is_the_simple_loss_plus_lambda_times_the_bound():
    x0, t = random_images(0), torch.tensor([0, 1, 200, 500, 900, 999])

    def network(x_t, t, context, mask):
        return torch.cat([torch.tanh(x_t), torch.sin(x_t)], dim=1)

    def compute(method, vlb_weight):
        diffusion = GaussianDiffusion(COSINE, "v", "learned_range", vlb_weight=vlb_weight)
        generator = torch.Generator().manual_seed(5)
        return getattr(diffusion, method)(network, x0, t, generator=generator)

    expected = compute("loss", 0.0) + 0.5 * compute("vlb", 0.0)
    torch.testing.assert_close(compute("loss", 0.5), expected, rtol=1e-6, atol=1e-6)
