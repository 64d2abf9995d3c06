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


def score_of(world):
    """The true score of a world's points [B, D] after the time t."""
    return lambda x, t: world.score(x, 1.0, float(SDE.marginal_std(t[0])))


def test_the_marginal_variance_is_the_integral_of_the_diffusion_coefficient():
    t = torch.linspace(0, 0.7, 20_001, dtype=torch.float64)
    integral = torch.trapezoid(SDE.diffusion_coefficient(t) ** 2, t)
    assert float(SDE.marginal_std(t[-1])) ** 2 == pytest.approx(float(integral), rel=1e-7)
    assert float(SDE.marginal_std(torch.tensor(1.0))) == pytest.approx(9.85, abs=0.01)
    with pytest.raises(ValueError, match="0.5"):
        VarianceExploding(0.5)


def test_the_loss_is_least_at_the_true_score():
    """For data N(0, v): E|s score + z|² = v / (v + s²) with the true score, more with any other."""
    v, t, g = 0.25, torch.full((40_000,), 0.3, dtype=torch.float64), torch.Generator().manual_seed(0)
    s = float(SDE.marginal_std(t[0]))
    x0 = v ** 0.5 * torch.randn(40_000, 1, 1, 1, generator=g, dtype=torch.float64)
    def network(factor):
        # the network sees x / sqrt(1 + s²) and 1000 t, and answers s · score
        def answer(x, t, context, mask):
            assert t[0] == 300
            return -factor * s * x * math.sqrt(1 + s ** 2) / (v + s ** 2)
        return answer
    loss = [float(SDE.loss(network(f), x0, t, generator=torch.Generator().manual_seed(1)).mean()) for f in (1.0, 0.8, 1.2)]
    assert loss[0] == pytest.approx(v / (v + s ** 2), rel=0.03)             # 40,000 numbers: standard error 0.7%
    assert loss[1] > loss[0] * 1.03 and loss[2] > loss[0] * 1.03


@pytest.mark.parametrize("sampler, options", [(euler_maruyama, dict(steps=500)), (predictor_corrector, dict(steps=200))])
@pytest.mark.parametrize("world", ["single_gaussian", "mixture"])
def test_the_reverse_sde_reaches_the_mean_and_covariance(request, world, sampler, options):
    world = request.getfixturevalue(world)
    *_, last = sampler(score_of(world), SDE, (20_000, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0), **options)
    assert last.index == options["steps"] - 1 and last.t == pytest.approx(1e-3)
    # Standard errors 0.004 and 0.003; the rest is the steps' own error, and the end at t = 1e-3
    world.assert_reached_by(last.mean, mean=0.02, covariance=0.02)


def test_langevins_step_has_the_asked_ratio_of_score_to_noise():
    """x moves by e·score + sqrt(2 e) z; with a constant score the two parts can be told apart by their mean and deviation."""
    x, push = torch.zeros(4000, 30, dtype=torch.float64), torch.full((30,), 5.0, dtype=torch.float64)
    t = torch.tensor(0.5, dtype=torch.float64)
    moved = langevin_step(lambda x, t: push.expand_as(x), x, t, snr=0.3, generator=torch.Generator().manual_seed(0))
    e = float(moved.mean()) / 5
    assert float(moved.std()) == pytest.approx((2 * e) ** 0.5, rel=0.02)
    assert e * float(push.norm()) / ((2 * e) ** 0.5 * 30 ** 0.5) == pytest.approx(0.3, rel=0.03)      # |z| is 30^½ but for 1%


def test_langevins_steps_reach_the_marginal_from_anywhere(mixture):
    """At t = 0.05, s = 0.24, from one point outside; the steps have a length, so a little too much spread is left."""
    t, g = torch.tensor(0.05, dtype=torch.float64), torch.Generator().manual_seed(0)
    x, s = torch.full((8_000, 2), 0.9, dtype=torch.float64), float(SDE.marginal_std(t))
    for _ in range(1000):
        x = langevin_step(score_of(mixture), x, t, snr=0.16, generator=g)
    torch.testing.assert_close(x.mean(0), mixture.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(x.T), mixture.covariance + s ** 2 * torch.eye(2, dtype=torch.float64), rtol=0, atol=0.02)


def test_the_probability_flow_has_the_same_marginals_and_converges_with_order_four(single_gaussian):
    velocity, g = probability_flow(score_of(single_gaussian), SDE), torch.Generator().manual_seed(0)
    start = float(SDE.marginal_std(torch.tensor(1.0))) * torch.randn(20_000, 2, generator=g, dtype=torch.float64)
    *_, last = integrate_ode(velocity, start, 1.0, 1e-3, steps=60)
    single_gaussian.assert_reached_by(last.x, mean=0.04, covariance=0.02)          # it starts at N(0, s²), not at N(mean, s² + covariance)
    # exact: each direction of x - mean shrinks as sqrt(variance + s²)
    values, vectors = torch.linalg.eigh(single_gaussian.covariance)
    s = [float(SDE.marginal_std(torch.tensor(t, dtype=torch.float64))) for t in (0.9, 0.2)]
    exact = single_gaussian.mean + (start - single_gaussian.mean) @ vectors * torch.sqrt((values + s[1] ** 2) / (values + s[0] ** 2)) @ vectors.T
    errors, counts = [], (10, 20, 40)
    for count in counts:
        *_, last = integrate_ode(velocity, start, 0.9, 0.2, steps=count)
        errors.append(float((last.x - exact).abs().max()))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(4, abs=0.3), errors


def test_the_likelihood_of_one_number_is_its_density():
    """In one dimension the divergence is no estimate. The ODE begins at t = 1e-3, where the data has a blur of s = 0.032."""
    v, x = 0.2, torch.linspace(-1.2, 1.2, 9, dtype=torch.float64)[:, None]
    def score(x, t):
        return -x / (v + broadcast_like(SDE.marginal_std(t), x) ** 2)
    s0, s1 = (float(SDE.marginal_std(torch.tensor(t, dtype=torch.float64))) for t in (1e-3, 1.0))
    ours = log_likelihood(probability_flow(score, SDE), x, prior_std=math.sqrt(v + s1 ** 2), steps=100)
    exact = torch.distributions.Normal(0.0, math.sqrt(v + s0 ** 2)).log_prob(x[:, 0])
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-6)


def test_the_mean_likelihood_is_that_of_the_density(mixture):
    """Of points drawn from two heaps; the divergence is estimated, without bias."""
    g = torch.Generator().manual_seed(0)
    which = torch.multinomial(mixture.weights, 4000, replacement=True, generator=g)
    root = torch.linalg.cholesky(mixture.covariances)
    x = mixture.means[which] + (root[which] @ torch.randn(4000, 2, 1, generator=g, dtype=torch.float64))[..., 0]
    s0, s1 = (float(SDE.marginal_std(torch.tensor(t, dtype=torch.float64))) for t in (1e-3, 1.0))
    x = x + s0 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    ours = log_likelihood(probability_flow(score_of(mixture), SDE), x, prior_std=s1, steps=60, generator=g)
    exact = mixture.log_density(x, 1.0, s0)
    difference = ours - exact                               # the same points: only the estimate's own noise is left
    assert float(difference.mean()) == pytest.approx(0, abs=4 * float(difference.std()) / 4000 ** 0.5 + 0.01)
    assert float(difference.mean().abs()) < 0.05 and float(exact.std()) > 0.3


def test_whole_timesteps_are_no_times_of_an_sde():
    with pytest.raises(ValueError, match="torch.int64: train with timesteps=uniform_time"):
        SDE.loss(lambda x, *a: x, torch.zeros(2, 1, 1, 1), torch.tensor([3, 500]))
    with pytest.raises(ValueError, match="steps=0"):
        log_likelihood(lambda x, t: x, torch.zeros(2, 1), 1.0, steps=0)


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(least=0.0)])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
        next(euler_maruyama(lambda x, t: x, SDE, (1, 1), **wrong))
