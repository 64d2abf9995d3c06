import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from easy_diffusion.diffusion.schedule import NoiseSchedule


@pytest.mark.parametrize("ours, theirs", [
    (NoiseSchedule.linear(1000), dict(beta_schedule="linear")),
    (NoiseSchedule.cosine(1000), dict(beta_schedule="squaredcos_cap_v2")),
    (NoiseSchedule.scaled_linear(1000), dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    (NoiseSchedule.quad(200, 1e-3, 0.03), dict(beta_schedule="scaled_linear", beta_start=1e-3, beta_end=0.03, num_train_timesteps=200)),
    (NoiseSchedule.sigmoid(1000), dict(beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02)),
    (NoiseSchedule.cosine(50), dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)),
])
def test_betas_equal_diffusers(ours, theirs):
    betas = DDPMScheduler(**theirs).betas               # float32 there
    torch.testing.assert_close(ours.betas.float(), betas, rtol=1e-6, atol=1e-7)


def test_alpha_bar_is_the_product_of_what_each_step_leaves():
    schedule = NoiseSchedule([0.1, 0.2, 0.5])
    torch.testing.assert_close(schedule.alpha_bar, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.alpha_t ** 2 + schedule.sigma_t ** 2, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-15)
    assert schedule.alpha_bar_at(1) == pytest.approx(0.72, abs=1e-15) and schedule.alpha_bar_at(-1) == 1.0


def test_cosine_follows_its_formula_in_float64():
    schedule, t = NoiseSchedule.cosine(1000), 500
    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    assert float(schedule.alpha_bar[t]) == pytest.approx(f((t + 1) / 1000) / f(0), abs=1e-14)


def test_signal_and_noise_take_the_form_of_what_they_multiply():
    x = torch.zeros(2, 3, 4, 4)
    signal, noise = NoiseSchedule.linear(10).alpha_sigma(torch.tensor([0, 9]), x)
    assert signal.shape == noise.shape == (2, 1, 1, 1) and signal.dtype == torch.float32


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.5], [1.0, 0.5], [float("nan")]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError):
        NoiseSchedule(betas)


def test_jsd_lets_the_signal_fall_on_a_straight_line_to_nothing():
    schedule = NoiseSchedule.jsd(100)
    assert schedule.betas[[0, 1, 98, 99]].tolist() == pytest.approx([1 / 100, 1 / 99, 1 / 2, 1], abs=1e-15)
    torch.testing.assert_close(schedule.alpha_bar, 1 - torch.arange(1, 101, dtype=torch.float64) / 100, rtol=0, atol=1e-13)


def test_const_lets_the_signal_decay_by_the_same_factor():
    schedule = NoiseSchedule.const(300, 0.03)
    torch.testing.assert_close(schedule.alpha_bar, 0.97 ** torch.arange(1, 301, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.scaled_linear(), NoiseSchedule.cosine(100)],
                         ids=["linear", "scaled", "cosine"])
def test_zero_terminal_snr_equals_diffusers_and_ends_in_pure_noise(schedule):
    rescaled = schedule.zero_terminal_snr()
    assert rescaled.alpha_t[-1] == 0 and rescaled.sigma_t[-1] == 1
    assert rescaled.alpha_t[0] == pytest.approx(float(schedule.alpha_t[0]), abs=1e-12)            # the first one stays
    torch.testing.assert_close(rescaled.betas, rescale_zero_terminal_snr(schedule.betas), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="one timestep"):
        NoiseSchedule([0.5]).zero_terminal_snr()


def test_every_schedule_is_float64_and_only_ever_adds_noise():
    for build in (NoiseSchedule.linear, NoiseSchedule.quad, NoiseSchedule.scaled_linear, NoiseSchedule.const, NoiseSchedule.jsd,
                  NoiseSchedule.sigmoid, NoiseSchedule.cosine):
        schedule = build(200)
        assert len(schedule) == 200 and schedule.betas.dtype == torch.float64
        assert (schedule.alpha_t.diff() < 0).all() and (schedule.sigma_t.diff() > 0).all(), build
