import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_flow_match_euler_discrete

from easy_diffusion.diffusion.flow_matching import (
    RectifiedFlow,
    flow_euler,
    flow_heun,
    flow_log_likelihood,
)
from easy_diffusion.diffusion.guidance import clipped, guided
from easy_diffusion.diffusion.prediction import Prediction

from .test_samplers import TorchInFloat64

FLOW = RectifiedFlow()


# ---------------------------------------------------------------- path, loss and denoiser


def test_the_path_is_linear_and_its_velocity_reconstructs_both_ends():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64)
    eps = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t = FLOW.add_noise(x0, t, eps)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[4], eps[4])
    torch.testing.assert_close(x_t[2], (x0[2] + eps[2]) / 2)
    prediction = FLOW.to_prediction(eps - x0, x_t, t)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-14)


def test_the_loss_is_smallest_at_the_mean_velocity():
    """For data N(0, v) the variance of x_t is total = (1 - t)² v + t², and

    E[eps - x0 | x] = x (t - (1 - t) v) / total, with a loss of v / total.
    """
    v, t = 0.25, 0.5
    total = (1 - t) ** 2 * v + t ** 2
    generator = torch.Generator().manual_seed(0)
    x0 = v ** 0.5 * torch.randn(40_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    times = torch.full((40_000,), t)

    def compute_loss(factor):
        def network(x, time, context, mask):
            assert time[0] == 500
            return factor * x * (t - (1 - t) * v) / total

        generator = torch.Generator().manual_seed(1)
        return float(FLOW.loss(network, x0, times, generator=generator).mean())

    smallest = compute_loss(1)
    assert smallest == pytest.approx(v / total, rel=0.03)
    assert compute_loss(0.8) > smallest
    assert compute_loss(1.2) > smallest


def test_the_network_receives_1000_t():
    received = []

    def network(x, t, context, mask):
        received.append(t)
        return x

    FLOW.denoiser(network)(torch.zeros(2, 3, 4, 4), torch.tensor([0.25, 0.5]))
    assert received[0].tolist() == [250, 500]


def test_invalid_arguments_are_named():
    def identity(x, t, context, mask):
        return x

    def six_channels(x, t, context, mask):
        return torch.cat([x, x], dim=1)

    with pytest.raises(ValueError, match="not 0"):
        next(flow_euler(None, (1, 1), steps=0))
    with pytest.raises(ValueError, match="either shape"):
        next(flow_euler(None))
    with pytest.raises(ValueError, match="torch.int64: train with timesteps=logit_normal_time"):
        FLOW.loss(identity, torch.zeros(2, 3, 4, 4), torch.tensor([3, 500]))
    with pytest.raises(ValueError, match=r"not \(2, 6, 4, 4\)"):
        FLOW.loss(six_channels, torch.zeros(2, 3, 4, 4), torch.tensor([0.1, 0.5]))


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_euler_equals_diffusers(toy, monkeypatch, steps):
    monkeypatch.setattr(scheduling_flow_match_euler_discrete, "torch", TorchInFloat64())
    times = [1 - i / steps for i in range(steps + 1)]
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times[:-1])
    scheduler.sigmas = torch.tensor(times, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    ours = flow_euler(FLOW.denoiser(toy), steps=steps, x_T=x)
    for i, (t, step) in enumerate(zip(scheduler.timesteps, ours, strict=True)):
        exact_t = torch.full((2,), 1000 * times[i], dtype=torch.float64)    # theirs is float32
        x = scheduler.step(toy(x, exact_t), t, x).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler, steps", [(flow_euler, 300), (flow_heun, 60)])
@pytest.mark.parametrize("data", ["single_gaussian", "mixture"])
def test_samples_have_the_mean_and_covariance_of_the_data(request, data, sampler, steps):
    data = request.getfixturevalue(data)
    *_, last = sampler(
        data.denoiser(FLOW), (20_000, 2, 1, 1), steps,
        dtype=torch.float64, generator=torch.Generator().manual_seed(0),
    )
    assert last.index == steps - 1
    assert last.t == pytest.approx(1 / steps)
    data.assert_moments(last.x, mean=0.012, covariance=0.01)


@pytest.mark.parametrize("sampler, order", [(flow_euler, 1), (flow_heun, 2)])
def test_order_of_convergence_to_the_exact_solution(single_gaussian, sampler, order):
    """In the eigenvectors of Σ, (x - (1 - t) mean) / sqrt((1 - t)² variance + t²) is constant."""
    values, vectors = torch.linalg.eigh(single_gaussian.covariance)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    exact = single_gaussian.mean + x_T @ vectors * values.sqrt() @ vectors.T
    errors, step_counts = [], (20, 40, 80, 160)
    for steps in step_counts:
        denoise = single_gaussian.denoiser(FLOW)
        *_, last = sampler(denoise, steps=steps, x_T=x_T.view(50, 2, 1, 1))
        errors.append(float((last.x.view(50, 2) - exact).abs().max()))
    slope = -np.polyfit(np.log(step_counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2), errors


def test_guidance_and_clipping_work_with_a_flow(single_gaussian):
    def denoise_uncond(x, t):
        return Prediction(x0=torch.zeros_like(x), eps=x / t[0])

    denoise_cond = single_gaussian.denoiser(FLOW)
    denoise = guided(
        denoise_cond, denoise_uncond, scale=2.0,
        interval=(0.1, 0.9), rescale=0.5, schedule=FLOW,
    )
    *_, last = flow_euler(
        clipped(denoise, FLOW), (500, 2, 1, 1), steps=20,
        dtype=torch.float64, generator=torch.Generator().manual_seed(0),
    )
    assert last.x0.abs().max() <= 1
    # Guidance moves the first coordinate beyond its mean of 0.5.
    assert last.x.flatten(1).mean(0)[0] > 0.6


# ---------------------------------------------------------------- likelihood


def test_the_log_likelihood_is_the_log_density(single_gaussian):
    """The estimate of the divergence is exact on average over the random signs only."""
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(single_gaussian.covariance)
    z = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    x = single_gaussian.mean + z @ root.T

    def denoise(x_t, t):
        """The optimal denoiser; at t = 0 eps is its limit, E[eps | x] = -sigma_t score."""
        alpha_t, sigma_t = 1 - float(t[0]), float(t[0])
        flat = x_t.flatten(1)
        x0 = single_gaussian.x0(flat, alpha_t, sigma_t)
        eps = -sigma_t * single_gaussian.score(flat, alpha_t, sigma_t)
        return Prediction(x0.view_as(x_t), eps.view_as(x_t))

    ours = flow_log_likelihood(denoise, x.view(2000, 2, 1, 1), steps=50, generator=generator)
    exact = single_gaussian.log_density(x)
    determinant = float(torch.linalg.det(single_gaussian.covariance))
    entropy = 0.5 * math.log((2 * math.pi * math.e) ** 2 * determinant)
    # 2,000 points: a standard error of 0.022
    assert float(-exact.mean()) == pytest.approx(entropy, abs=0.1)
    assert float(-ours.mean()) == pytest.approx(entropy, abs=0.1)
    standard_error = float((ours - exact).std()) / 2000 ** 0.5
    assert float((ours - exact).mean()) == pytest.approx(0, abs=4 * standard_error + 1e-3)


def test_the_log_likelihood_is_integrated_from_the_given_start():
    """A denoiser that divides by sigma_t has no value at t = 0."""
    times = []

    def denoise(x_t, t):
        times.append(float(t[0]))
        return Prediction(x0=x_t / 2, eps=x_t)

    flow_log_likelihood(denoise, torch.zeros(2, 1, 2, 2), steps=3, start=0.25)
    assert min(times) == 0.25
    assert max(times) == 1
