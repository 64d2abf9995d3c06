"""What several tests share: a toy network and a Gaussian world whose best denoiser is known exactly."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from easy_diffusion.diffusion.prediction import Prediction


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


class Mixture:
    """A world of Gaussian heaps, points [B, D], whose best denoiser is known exactly.

    x = signal x0 + noise ε comes from heap k as N(signal m_k, signal² Σ_k + noise² I), so with r_k(x) the odds of heap k
    E[x0 | x] = Σ_k r_k(x) (m_k + signal Σ_k (signal² Σ_k + noise² I)^-1 (x - signal m_k)).
    """

    def __init__(self, weights, means, covariances):
        self.weights, self.means, self.covariances = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covariances))
        self.dim = self.means.shape[1]
        self.mean = self.weights @ self.means
        spread = self.means - self.mean
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)
        self.covariance = within + torch.einsum("k,ki,kj->ij", self.weights, spread, spread)

    def _parts(self, x, signal, noise):
        total = signal ** 2 * self.covariances + noise ** 2 * torch.eye(self.dim, dtype=torch.float64)      # [K, D, D]
        away = x[:, None] - signal * self.means                                                             # [B, K, D]
        solved = torch.linalg.solve(total, away[..., None])[..., 0]                                         # [B, K, D]
        log_p = self.weights.log() - 0.5 * (away * solved).sum(-1) - 0.5 * torch.logdet(total) - self.dim / 2 * math.log(2 * math.pi)
        return solved, log_p

    def x0(self, x, signal, noise):
        """E[x0 | x], [B, D]."""
        solved, log_p = self._parts(x, signal, noise)
        expected = self.means + signal * torch.einsum("kij,bkj->bki", self.covariances, solved)
        return (log_p.softmax(1)[..., None] * expected).sum(1)

    def score(self, x, signal, noise):
        """∇ log p(x), [B, D]."""
        solved, log_p = self._parts(x, signal, noise)
        return -(log_p.softmax(1)[..., None] * solved).sum(1)

    def log_density(self, x, signal=1.0, noise=0.0):
        return self._parts(x, signal, noise)[1].logsumexp(1)

    def denoiser(self, schedule):
        """For pictures [B, D, 1, 1]; schedule: a NoiseSchedule or a RectifiedFlow."""
        def denoise(x_t, t):
            signal, noise = (float(v[0]) for v in schedule.alpha_sigma(t[:1], x_t))
            x0 = self.x0(x_t.flatten(1), signal, noise).view_as(x_t)
            return Prediction(x0, (x_t - signal * x0) / noise)

        return denoise

    def assert_reached_by(self, x, mean, covariance):
        """The moments of samples x [N, D, ...], within these tolerances."""
        x = x.flatten(1)
        torch.testing.assert_close(x.mean(0), self.mean, rtol=0, atol=mean)
        torch.testing.assert_close(torch.cov(x.T), self.covariance, rtol=0, atol=covariance)


@pytest.fixture
def mixture():
    """Two heaps of different weight, width and direction within [-1, 1]²."""
    return Mixture([0.3, 0.7], [[-0.6, 0.4], [0.4, -0.2]], [[[0.04, 0.02], [0.02, 0.03]], [[0.02, -0.01], [-0.01, 0.06]]])


@pytest.fixture
def single_gaussian():
    """A Gaussian whose two coordinates go together."""
    return Mixture([1.0], [[0.5, -0.3]], [[[0.30, 0.12], [0.12, 0.10]]])


@pytest.fixture
def gaussian():
    """(mean [D], covariance [D, D], schedule) → the best possible denoiser for data N(mean, covariance) of shape [B, D, 1, 1]."""
    return lambda mean, covariance, schedule: Mixture([1.0], mean[None], covariance[None]).denoiser(schedule)
