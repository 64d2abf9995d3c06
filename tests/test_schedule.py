import math

import pytest
import torch
from diffusers import DDPMScheduler

from easy_diffusion.schedule import NoiseSchedule


@pytest.mark.parametrize("ours, theirs", [
    (NoiseSchedule.linear(1000), dict(beta_schedule="linear")),
    (NoiseSchedule.cosine(1000), dict(beta_schedule="squaredcos_cap_v2")),
    (NoiseSchedule.cosine(50), dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)),
])
def test_betas_equal_diffusers(ours, theirs):
    betas = DDPMScheduler(**theirs).betas               # float32 there
    torch.testing.assert_close(ours.betas.float(), betas, rtol=1e-6, atol=1e-7)


def test_alpha_bar_is_the_product_of_what_each_step_leaves():
    schedule = NoiseSchedule([0.1, 0.2, 0.5])
    torch.testing.assert_close(schedule.alphas_bar, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.signal ** 2 + schedule.noise ** 2, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-15)
    assert schedule.alpha_bar(1) == pytest.approx(0.72, abs=1e-15) and schedule.alpha_bar(-1) == 1.0


def test_cosine_follows_its_formula_in_float64():
    schedule, t = NoiseSchedule.cosine(1000), 500
    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    assert float(schedule.alphas_bar[t]) == pytest.approx(f((t + 1) / 1000) / f(0), abs=1e-14)


def test_signal_and_noise_take_the_form_of_what_they_multiply():
    x = torch.zeros(2, 3, 4, 4)
    signal, noise = NoiseSchedule.linear(10).signal_and_noise(torch.tensor([0, 9]), x)
    assert signal.shape == noise.shape == (2, 1, 1, 1) and signal.dtype == torch.float32


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.5], [float("nan")]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError):
        NoiseSchedule(betas)
