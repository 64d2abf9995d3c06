import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_flow_match_euler_discrete

from easy_diffusion.diffusion.flow_matching import RectifiedFlow, flow_euler, flow_heun, flow_log_likelihood
from easy_diffusion.diffusion.guidance import clipped, guided
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.timesteps import logit_normal_time
from tests.diffusion.test_samplers import InDouble

FLOW = RectifiedFlow()


def test_the_path_is_straight_and_its_velocity_gives_back_both_ends():
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t = FLOW.add_noise(x0, t, noise)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[4], noise[4])
    torch.testing.assert_close(x_t[2], (x0[2] + noise[2]) / 2)
    prediction = FLOW.to_prediction(noise - x0, x_t, t)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(prediction.eps, noise, rtol=0, atol=1e-14)


def test_the_loss_is_least_at_the_mean_velocity():
    """Data N(0, v), t = 1/2: E[ε - x0 | x] = x (t - (1 - t) v) / ((1 - t)² v + t²), with a loss of v / ((1 - t)² v + t²)."""
    v, t, g = 0.25, 0.5, torch.Generator().manual_seed(0)
    x0 = v ** 0.5 * torch.randn(40_000, 1, 1, 1, generator=g, dtype=torch.float64)
    total = (1 - t) ** 2 * v + t ** 2
    def network(factor):
        def answer(x, time, context, mask):
            assert time[0] == 500
            return factor * x * (t - (1 - t) * v) / total
        return answer
    loss = [float(FLOW.loss(network(factor), x0, torch.full((40_000,), t), generator=torch.Generator().manual_seed(1)).mean())
            for factor in (1, 0.8, 1.2)]
    assert loss[0] == pytest.approx(v / total, rel=0.03) and min(loss[1:]) > loss[0]


def test_the_network_sees_a_thousand_times_the_time():
    seen = []
    FLOW.denoiser(lambda x, t, c, m: seen.append(t) or x)(torch.zeros(2, 3, 4, 4), torch.tensor([0.25, 0.5]))
    assert seen[0].tolist() == [250, 500]


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_euler_equals_diffusers(toy, monkeypatch, steps):
    monkeypatch.setattr(scheduling_flow_match_euler_discrete, "torch", InDouble())
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    scheduler.sigmas = torch.tensor([1 - i / steps for i in range(steps + 1)], dtype=torch.float64)
    x = x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i, (t, step) in enumerate(zip(scheduler.timesteps, flow_euler(FLOW.denoiser(toy), steps=steps, x_T=x_T), strict=True)):
        exact = torch.full((2,), 1000 * (1 - i / steps), dtype=torch.float64)          # theirs is rounded to float32
        x = scheduler.step(toy(x, exact), t, x).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler, steps", [(flow_euler, 300), (flow_heun, 60)])
@pytest.mark.parametrize("world", ["single_gaussian", "mixture"])
def test_the_flow_reaches_the_mean_and_covariance(request, world, sampler, steps):
    world = request.getfixturevalue(world)
    *_, last = sampler(world.denoiser(FLOW), (20_000, 2, 1, 1), steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert last.index == steps - 1 and last.t == pytest.approx(1 / steps)
    world.assert_reached_by(last.x, mean=0.012, covariance=0.01)


@pytest.mark.parametrize("sampler, order", [(flow_euler, 1), (flow_heun, 2)])
def test_order_of_convergence(single_gaussian, sampler, order):
    """Exact: in the directions of Σ, (x - mean (1 - t)) / sqrt((1 - t)² variance + t²) stays as it is."""
    values, vectors = torch.linalg.eigh(single_gaussian.covariance)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = single_gaussian.mean + x @ vectors * values.sqrt() @ vectors.T
    errors, counts = [], (20, 40, 80, 160)
    for count in counts:
        *_, last = sampler(single_gaussian.denoiser(FLOW), steps=count, x_T=x.view(50, 2, 1, 1))
        errors.append(float((last.x.view(50, 2) - exact).abs().max()))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(order, abs=0.2), errors


def test_the_likelihood_is_the_density(single_gaussian):
    """The divergence is exact on average over the signs: here over both that differ."""
    g = torch.Generator().manual_seed(0)
    x = single_gaussian.mean + torch.randn(2000, 2, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(single_gaussian.covariance).T
    ours = flow_log_likelihood(lambda x_t, t: at_least(single_gaussian, x_t, t), x.view(2000, 2, 1, 1), steps=50, generator=g)
    exact = single_gaussian.log_density(x)
    entropy = 0.5 * math.log((2 * math.pi * math.e) ** 2 * float(torch.linalg.det(single_gaussian.covariance)))
    assert float(-exact.mean()) == pytest.approx(entropy, abs=0.1)
    assert float((ours - exact).mean()) == pytest.approx(0, abs=4 * float((ours - exact).std()) / 2000 ** 0.5 + 1e-3)
    assert float(-ours.mean()) == pytest.approx(entropy, abs=0.1)           # 2,000 points: a standard error of 0.022


def at_least(world, x_t, t):
    """The world's denoiser, its noise at t = 0 by its limit: E[ε | x] = -noise · score."""
    signal, noise = 1 - float(t[0]), float(t[0])
    x = x_t.flatten(1)
    return Prediction(world.x0(x, signal, noise).view_as(x_t), (-noise * world.score(x, signal, noise)).view_as(x_t))


def test_guidance_and_clipping_serve_a_flow_as_they_are(single_gaussian):
    text = single_gaussian.denoiser(FLOW)
    def nothing(x, t):
        x0 = torch.zeros_like(x)
        return Prediction(x0, x / t[0])
    denoise = clipped(guided(text, nothing, scale=2.0, interval=(0.1, 0.9), rescale=0.5, schedule=FLOW), FLOW)
    *_, last = flow_euler(denoise, (500, 2, 1, 1), steps=20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert last.x0.abs().max() <= 1 and last.x.flatten(1).mean(0)[0] > 0.6  # beyond the mean of 0.5, as guidance pushes


def test_times_lie_where_they_should():
    t = logit_normal_time(100_000, 1000, torch.Generator().manual_seed(0))
    assert 0 < t.min() and t.max() < 1 and float(t.mean()) == pytest.approx(0.5, abs=0.003)
    # P(1/4 < sigmoid(z) < 3/4) = P(|z| < ln 3) = 0.728
    assert float(((t > 0.25) & (t < 0.75)).float().mean()) == pytest.approx(0.728, abs=0.005)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="not 0"):
        next(flow_euler(None, (1, 1), steps=0))
    with pytest.raises(ValueError, match="either shape"):
        next(flow_euler(None))
    with pytest.raises(ValueError, match="torch.int64: train with timesteps=logit_normal_time"):
        FLOW.loss(lambda x, *a: x, torch.zeros(2, 3, 4, 4), torch.tensor([3, 500]))
    with pytest.raises(ValueError, match=r"answers with \(2, 6, 4, 4\)"):
        FLOW.loss(lambda x, *a: torch.cat([x, x], dim=1), torch.zeros(2, 3, 4, 4), torch.tensor([0.1, 0.5]))
