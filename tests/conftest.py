"""What several tests share: a toy network and a Gaussian world whose best denoiser is known exactly."""

import shutil
from pathlib import Path

import pytest
import torch

from easy_diffusion.samplers import Prediction


def pytest_sessionstart(session):
    """The notebooks, run in short, keep their store and their network here; each session begins anew."""
    shutil.rmtree(Path(__file__).parents[1] / "out" / "tiny", ignore_errors=True)


@pytest.fixture
def toy():
    """A fixed float64 network (x, t, context, mask) → the same shape: smooth, nonlinear, different at each t."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64) / 5

    def network(x, t, context=None, mask=None):
        return torch.tanh(torch.nn.functional.conv2d(x, weight, padding=1)) * (1 + t.view(-1, 1, 1, 1) / 1000)

    return network


@pytest.fixture
def gaussian():
    """(mean [D], covariance [D, D], schedule) → the best possible denoiser for data N(mean, covariance) of shape [B, D, 1, 1].

    E[x0 | x_t] = mean + signal Σ (signal² Σ + noise² I)^-1 (x_t - signal mean).
    """
    def build(mean, covariance, schedule):
        eye = torch.eye(len(mean), dtype=mean.dtype)

        def denoise(x_t, t):
            signal, noise = float(schedule.signal[t[0]]), float(schedule.noise[t[0]])
            gain = signal * covariance @ torch.linalg.inv(signal ** 2 * covariance + noise ** 2 * eye)
            x0 = mean + (x_t.flatten(1) - signal * mean) @ gain.T
            x0 = x0.view_as(x_t)
            return Prediction(x0, (x_t - signal * x0) / noise)

        return denoise

    return build
