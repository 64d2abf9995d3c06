import math

import numpy as np
import pytest
import torch

from easy_diffusion.diffusion.prediction import broadcast_like
from easy_diffusion.diffusion.score_sde import (
    VarianceExploding,
    euler_maruyama,
    integrate_ode,
    langevin_step,
    log_likelihood,
    predictor_corrector,
    probability_flow,
)

SDE = VarianceExploding(25.0)


def exact_score(data):
    """The true score function of a Mixture's points [B, D] at time t."""
    def score(x, t):
        return data.score(x, 1.0, float(SDE.marginal_std(t[0])))

    return score


def marginal_std_at(t):
    """sigma_t as a float, computed in float64."""
    return float(SDE.marginal_std(torch.tensor(t, dtype=torch.float64)))


# ---------------------------------------------------------------- the SDE and its loss


def test_the_marginal_variance_is_the_integral_of_the_squared_diffusion_coefficient():
    t = torch.linspace(0, 0.7, 20_001, dtype=torch.float64)
    integral = torch.trapezoid(SDE.diffusion_coefficient(t) ** 2, t)
    assert float(SDE.marginal_std(t[-1])) ** 2 == pytest.approx(float(integral), rel=1e-7)
    assert float(SDE.marginal_std(torch.tensor(1.0))) == pytest.approx(9.85, abs=0.01)
    with pytest.raises(ValueError, match="0.5"):
        VarianceExploding(0.5)


def test_the_loss_is_smallest_at_the_true_score():
    """For data N(0, v) the smallest value of E|sigma_t score + eps|² is v / (v + sigma_t²)."""
    v, t = 0.25, torch.full((40_000,), 0.3, dtype=torch.float64)
    sigma_t = float(SDE.marginal_std(t[0]))
    generator = torch.Generator().manual_seed(0)
    x0 = v ** 0.5 * torch.randn(40_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    def compute_loss(factor):
        def network(x, t, context, mask):
            """Receives x / sqrt(1 + sigma_t²) and 1000 t; predicts sigma_t · score."""
            assert t[0] == 300
            return -factor * sigma_t * x * math.sqrt(1 + sigma_t ** 2) / (v + sigma_t ** 2)

        generator = torch.Generator().manual_seed(1)
        return float(SDE.loss(network, x0, t, generator=generator).mean())

    smallest = compute_loss(1.0)
    # 40,000 values: standard error 0.7%
    assert smallest == pytest.approx(v / (v + sigma_t ** 2), rel=0.03)
    assert compute_loss(0.8) > smallest * 1.03
    assert compute_loss(1.2) > smallest * 1.03


# ---------------------------------------------------------------- the reverse SDE


@pytest.mark.parametrize(
    "sampler, options",
    [(euler_maruyama, dict(steps=500)), (predictor_corrector, dict(steps=200))],
)
@pytest.mark.parametrize("data", ["single_gaussian", "mixture"])
def test_samples_have_the_mean_and_covariance_of_the_data(request, data, sampler, options):
    data = request.getfixturevalue(data)
    *_, last = sampler(
        exact_score(data), SDE, (20_000, 2),
        dtype=torch.float64, generator=torch.Generator().manual_seed(0), **options,
    )
    assert last.index == options["steps"] - 1
    assert last.t == pytest.approx(1e-3)
    # Standard errors are 0.004 and 0.003. The rest is for the error of the method and the
    # end at t = 1e-3.
    data.assert_moments(last.mean, mean=0.02, covariance=0.02)


def test_the_corrector_asks_for_the_score_at_the_time_at_which_its_step_starts():
    """The times are 1, 0.8, 0.6, 0.4 and 0.2. Two Langevin steps and the predictor share one."""
    times = []

    def score(x, t):
        times.append(float(t[0]))
        return -x

    steps = predictor_corrector(
        score, SDE, (3, 2), steps=4, corrections=2, t_min=0.2, dtype=torch.float64
    )
    reached = [step.t for step in steps]
    assert times == pytest.approx([1, 1, 1, 0.8, 0.8, 0.8, 0.6, 0.6, 0.6, 0.4, 0.4, 0.4])
    assert reached == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("sampler", [euler_maruyama, predictor_corrector])
def test_sampling_starts_from_noise_with_the_marginal_std_of_t_1(sampler):
    """With a score of zero the mean of the first step is the initial noise."""
    options = {} if sampler is euler_maruyama else {"corrections": 0}
    steps = sampler(
        lambda x, t: torch.zeros_like(x), SDE, (100_000, 1), steps=2,
        generator=torch.Generator().manual_seed(0), **options,
    )
    # standard error: 0.2%
    assert float(next(steps).mean.std()) == pytest.approx(marginal_std_at(1.0), rel=0.01)


def test_the_langevin_step_has_the_given_ratio_of_score_to_noise():
    """With a constant score, δ score is the mean of the step, and sqrt(2 δ) its std."""
    x = torch.zeros(4000, 30, dtype=torch.float64)
    constant = torch.full((30,), 5.0, dtype=torch.float64)

    def score(x, t):
        return constant.expand_as(x)

    t = torch.tensor(0.5, dtype=torch.float64)
    x = langevin_step(score, x, t, snr=0.3, generator=torch.Generator().manual_seed(0))
    delta = float(x.mean()) / 5
    assert float(x.std()) == pytest.approx((2 * delta) ** 0.5, rel=0.02)
    noise_norm = (2 * delta) ** 0.5 * 30 ** 0.5             # |z| is sqrt(30) within 1%
    assert delta * float(constant.norm()) / noise_norm == pytest.approx(0.3, rel=0.03)


def test_langevin_steps_converge_to_the_marginal_from_any_start(mixture):
    """At t = 0.05, sigma_t = 0.24, from one point; the finite step size adds a little variance."""
    t, generator = torch.tensor(0.05, dtype=torch.float64), torch.Generator().manual_seed(0)
    sigma_t = float(SDE.marginal_std(t))
    x = torch.full((8_000, 2), 0.9, dtype=torch.float64)
    for _ in range(1000):
        x = langevin_step(exact_score(mixture), x, t, snr=0.16, generator=generator)
    covariance = mixture.covariance + sigma_t ** 2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(x.mean(0), mixture.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=0.02)


# ---------------------------------------------------------------- the probability flow ODE


def test_the_probability_flow_has_the_same_marginals_and_fourth_order(single_gaussian):
    velocity = probability_flow(exact_score(single_gaussian), SDE)
    generator = torch.Generator().manual_seed(0)
    sigma_1 = float(SDE.marginal_std(torch.tensor(1.0)))
    start = sigma_1 * torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    *_, last = integrate_ode(velocity, start, 1.0, 1e-3, steps=60)
    # It starts from N(0, sigma_1²), not from N(mean, covariance + sigma_1²).
    single_gaussian.assert_moments(last.x, mean=0.04, covariance=0.02)

    # Exact solution: in the eigenvectors of the covariance,
    # (x - mean) / sqrt(variance + sigma_t²) is constant.
    values, vectors = torch.linalg.eigh(single_gaussian.covariance)
    sigma_start, sigma_end = marginal_std_at(0.9), marginal_std_at(0.2)
    ratio = torch.sqrt((values + sigma_end ** 2) / (values + sigma_start ** 2))
    mean = single_gaussian.mean
    exact = mean + (start - mean) @ vectors * ratio @ vectors.T
    errors, step_counts = [], (10, 20, 40)
    for steps in step_counts:
        *_, last = integrate_ode(velocity, start, 0.9, 0.2, steps=steps)
        errors.append(float((last.x - exact).abs().max()))
    slope = -np.polyfit(np.log(step_counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(4, abs=0.3), errors


# ---------------------------------------------------------------- likelihoods


def test_the_log_likelihood_in_one_dimension_is_the_log_density():
    """In one dimension the divergence is exact. At t = 1e-3 the data has noise of std 0.032."""
    v, x = 0.2, torch.linspace(-1.2, 1.2, 9, dtype=torch.float64)[:, None]

    def score(x, t):
        return -x / (v + broadcast_like(SDE.marginal_std(t), x) ** 2)

    sigma_0, sigma_1 = marginal_std_at(1e-3), marginal_std_at(1.0)
    prior_std = math.sqrt(v + sigma_1 ** 2)
    ours = log_likelihood(probability_flow(score, SDE), x, prior_std=prior_std, steps=100)
    exact = torch.distributions.Normal(0.0, math.sqrt(v + sigma_0 ** 2)).log_prob(x[:, 0])
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-6)


def test_the_mean_log_likelihood_is_that_of_the_density(mixture):
    """The data are points of the mixture; the estimate of the divergence is unbiased."""
    generator = torch.Generator().manual_seed(0)
    component = torch.multinomial(mixture.weights, 4000, replacement=True, generator=generator)
    root = torch.linalg.cholesky(mixture.covariances)
    z = torch.randn(4000, 2, 1, generator=generator, dtype=torch.float64)
    x = mixture.means[component] + (root[component] @ z)[..., 0]
    sigma_0, sigma_1 = marginal_std_at(1e-3), marginal_std_at(1.0)
    x = x + sigma_0 * torch.randn(x.shape, generator=generator, dtype=torch.float64)

    velocity = probability_flow(exact_score(mixture), SDE)
    ours = log_likelihood(velocity, x, prior_std=sigma_1, steps=60, generator=generator)
    exact = mixture.log_density(x, 1.0, sigma_0)
    difference = ours - exact               # at the same points, so only the estimate's error
    standard_error = float(difference.std()) / 4000 ** 0.5
    assert float(difference.mean()) == pytest.approx(0, abs=4 * standard_error + 0.01)
    assert float(difference.mean().abs()) < 0.05
    assert float(exact.std()) > 0.3


# ---------------------------------------------------------------- invalid arguments


def test_integer_timesteps_and_zero_steps_are_refused():
    with pytest.raises(ValueError, match="torch.int64: train with timesteps=uniform_time"):
        SDE.loss(lambda x, *_: x, torch.zeros(2, 1, 1, 1), torch.tensor([3, 500]))
    with pytest.raises(ValueError, match="steps=0"):
        log_likelihood(lambda x, t: x, torch.zeros(2, 1), 1.0, steps=0)


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(t_min=0.0)])
def test_invalid_arguments_are_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        next(euler_maruyama(lambda x, t: x, SDE, (1, 1), **wrong))
