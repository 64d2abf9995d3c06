import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from easy_diffusion.diffusion.schedule import NoiseSchedule


def assert_equal(actual, expected, rtol=0.0, atol=0.0):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "schedule, diffusers_options",
    [
        (NoiseSchedule.linear(1000), dict(beta_schedule="linear")),
        (NoiseSchedule.cosine(1000), dict(beta_schedule="squaredcos_cap_v2")),
        (
            NoiseSchedule.scaled_linear(1000),
            dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        ),
        (
            NoiseSchedule.quad(200, beta_start=1e-3, beta_end=0.03),
            dict(
                beta_schedule="scaled_linear",
                beta_start=1e-3,
                beta_end=0.03,
                num_train_timesteps=200,
            ),
        ),
        (
            NoiseSchedule.sigmoid(1000),
            dict(beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02),
        ),
        (
            NoiseSchedule.cosine(50),
            dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50),
        ),
    ],
)
def test_betas_equal_diffusers(schedule, diffusers_options):
    expected = DDPMScheduler(**diffusers_options).betas             # float32 in diffusers
    assert_equal(schedule.betas.float(), expected, rtol=1e-6, atol=1e-7)


def test_alpha_bar_is_the_cumulative_product_of_1_minus_beta():
    schedule = NoiseSchedule([0.1, 0.2, 0.5])
    expected = torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64)
    assert_equal(schedule.alpha_bar, expected, atol=1e-15)
    ones = torch.ones(3, dtype=torch.float64)
    assert_equal(schedule.alpha_t ** 2 + schedule.sigma_t ** 2, ones, atol=1e-15)
    assert schedule.alpha_bar_at(1) == pytest.approx(0.72, abs=1e-15)
    assert schedule.alpha_bar_at(-1) == 1.0


def test_alpha_at_and_sigma_at_are_those_of_a_timestep_and_1_and_0_at_the_clean_image():
    schedule = NoiseSchedule([0.1, 0.2, 0.5])
    assert schedule.alpha_at(1) == float(schedule.alpha_t[1])
    assert schedule.sigma_at(1) == float(schedule.sigma_t[1])
    assert schedule.alpha_at(0) < 1
    assert schedule.sigma_at(0) > 0
    assert schedule.alpha_at(-1) == 1.0
    assert schedule.sigma_at(-1) == 0.0


def test_cosine_schedule_equals_its_formula_in_float64():
    schedule, t = NoiseSchedule.cosine(1000), 500

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    assert float(schedule.alpha_bar[t]) == pytest.approx(f((t + 1) / 1000) / f(0), abs=1e-14)


def test_alpha_sigma_has_the_dimensions_and_dtype_of_x():
    x = torch.zeros(2, 3, 4, 4)
    alpha_t, sigma_t = NoiseSchedule.linear(10).alpha_sigma(torch.tensor([0, 9]), x)
    assert alpha_t.shape == sigma_t.shape == (2, 1, 1, 1)
    assert alpha_t.dtype == torch.float32


@pytest.mark.parametrize(
    "betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.5], [1.0, 0.5], [float("nan")]]
)
def test_invalid_betas_are_refused(betas):
    with pytest.raises(ValueError):
        NoiseSchedule(betas)


def test_alpha_bar_of_jsd_decreases_linearly_to_zero():
    schedule = NoiseSchedule.jsd(100)
    expected_betas = [1 / 100, 1 / 99, 1 / 2, 1]
    assert schedule.betas[[0, 1, 98, 99]].tolist() == pytest.approx(expected_betas, abs=1e-15)
    expected = 1 - torch.arange(1, 101, dtype=torch.float64) / 100
    assert_equal(schedule.alpha_bar, expected, atol=1e-13)


def test_alpha_bar_of_const_decays_exponentially():
    schedule = NoiseSchedule.const(300, 0.03)
    expected = 0.97 ** torch.arange(1, 301, dtype=torch.float64)
    assert_equal(schedule.alpha_bar, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.linear(), NoiseSchedule.scaled_linear(), NoiseSchedule.cosine(100)],
    ids=["linear", "scaled_linear", "cosine"],
)
def test_zero_terminal_snr_equals_diffusers_and_ends_in_pure_noise(schedule):
    rescaled = schedule.zero_terminal_snr()
    assert rescaled.alpha_t[-1] == 0
    assert rescaled.sigma_t[-1] == 1
    assert rescaled.alpha_t[0] == pytest.approx(float(schedule.alpha_t[0]), abs=1e-12)
    assert_equal(rescaled.betas, rescale_zero_terminal_snr(schedule.betas), atol=1e-9)
    with pytest.raises(ValueError, match="one timestep"):
        NoiseSchedule([0.5]).zero_terminal_snr()


def test_every_schedule_is_float64_and_adds_noise_at_each_timestep():
    for constructor in (
        NoiseSchedule.linear,
        NoiseSchedule.quad,
        NoiseSchedule.scaled_linear,
        NoiseSchedule.const,
        NoiseSchedule.jsd,
        NoiseSchedule.sigmoid,
        NoiseSchedule.cosine,
    ):
        schedule = constructor(200)
        assert len(schedule) == 200
        assert schedule.betas.dtype == torch.float64
        assert (schedule.alpha_t.diff() < 0).all(), constructor
        assert (schedule.sigma_t.diff() > 0).all(), constructor
