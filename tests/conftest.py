"""Shared fixtures: a toy network, and Gaussian mixtures with an exactly known denoiser."""

import math
import os
import shutil
from pathlib import Path

# One thread, set before torch is imported: a forked process hangs at its first parallel operation
# if this process has used several threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from datasets.dishes import dish_names
from easy_diffusion import presets, pretrained
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.networks.autoencoder import Autoencoder


def pytest_sessionstart(session):
    """Delete the data set and the network that the notebooks keep in out/tiny in a short run."""
    shutil.rmtree(Path(__file__).parents[1] / "out" / "tiny", ignore_errors=True)


@pytest.fixture
def hide_gpu(monkeypatch):
    """Hide the GPU from this process and its children."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def toy():
    """A fixed float64 network (x, t, context, mask) → a tensor of the shape of x.

    It is smooth and nonlinear in x and depends on t.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64) / 5

    def network(x, t, context=None, mask=None):
        features = torch.tanh(torch.nn.functional.conv2d(x, weight, padding=1))
        return features * (1 + t.view(-1, 1, 1, 1) / 1000)

    return network


class Mixture:
    """Data from a Gaussian mixture, points [B, D], whose optimal denoiser is known exactly.

    weights w_k [K], means m_k [K, D] and covariances Σ_k [K, D, D] of the components.

    Given component k, x_t = alpha_t x0 + sigma_t eps has the distribution N(alpha_t m_k, C_k) with
    C_k = alpha_t² Σ_k + sigma_t² I. With the posterior probability r_k(x) of component k

        E[x0 | x] = Σ_k r_k(x) (m_k + alpha_t Σ_k C_k^-1 (x - alpha_t m_k)).
    """

    def __init__(self, weights, means, covariances):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.covariances = torch.as_tensor(covariances, dtype=torch.float64)
        self.dim = self.means.shape[1]
        # The covariance is the mean of those within the components plus that of their means.
        self.mean = self.weights @ self.means
        centered = self.means - self.mean
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)
        between = torch.einsum("k,ki,kj->ij", self.weights, centered, centered)
        self.covariance = within + between

    def _components(self, x, alpha_t, sigma_t):
        """C_k^-1 (x - alpha_t m_k), [B, K, D], and log(w_k p_k(x)), [B, K]."""
        identity = torch.eye(self.dim, dtype=torch.float64)
        covariances = alpha_t ** 2 * self.covariances + sigma_t ** 2 * identity     # [K, D, D]
        centered = x[:, None] - alpha_t * self.means                                # [B, K, D]
        solved = torch.linalg.solve(covariances, centered[..., None])[..., 0]       # [B, K, D]
        log_p = (
            self.weights.log()
            - 0.5 * (centered * solved).sum(-1)
            - 0.5 * torch.logdet(covariances)
            - self.dim / 2 * math.log(2 * math.pi)
        )
        return solved, log_p

    def x0(self, x, alpha_t, sigma_t):
        """E[x0 | x], [B, D]."""
        solved, log_p = self._components(x, alpha_t, sigma_t)
        expected = self.means + alpha_t * torch.einsum("kij,bkj->bki", self.covariances, solved)
        return (log_p.softmax(1)[..., None] * expected).sum(1)

    def score(self, x, alpha_t, sigma_t):
        """∇ log p(x), [B, D]."""
        solved, log_p = self._components(x, alpha_t, sigma_t)
        return -(log_p.softmax(1)[..., None] * solved).sum(1)

    def log_density(self, x, alpha_t=1.0, sigma_t=0.0):
        """log p(x), [B]."""
        _, log_p = self._components(x, alpha_t, sigma_t)
        return log_p.logsumexp(1)

    def denoiser(self, schedule):
        """The optimal denoiser for x [B, D, 1, 1]; schedule: a NoiseSchedule or a RectifiedFlow."""
        def denoise(x_t, t):
            alpha_t, sigma_t = (float(value[0]) for value in schedule.alpha_sigma(t[:1], x_t))
            x0 = self.x0(x_t.flatten(1), alpha_t, sigma_t).view_as(x_t)
            return Prediction(x0, (x_t - alpha_t * x0) / sigma_t)

        return denoise

    def assert_moments(self, x, mean, covariance):
        """Check the mean and covariance of samples x [N, D, ...] within these tolerances."""
        x = x.flatten(1)
        torch.testing.assert_close(x.mean(0), self.mean, rtol=0, atol=mean)
        torch.testing.assert_close(torch.cov(x.T), self.covariance, rtol=0, atol=covariance)


@pytest.fixture
def mixture():
    """Two components within [-1, 1]² that differ in weight and covariance."""
    return Mixture(
        weights=[0.3, 0.7],
        means=[[-0.6, 0.4], [0.4, -0.2]],
        covariances=[[[0.04, 0.02], [0.02, 0.03]], [[0.02, -0.01], [-0.01, 0.06]]],
    )


@pytest.fixture
def single_gaussian():
    """One Gaussian with correlated coordinates."""
    return Mixture(
        weights=[1.0],
        means=[[0.5, -0.3]],
        covariances=[[[0.30, 0.12], [0.12, 0.10]]],
    )


@pytest.fixture
def gaussian():
    """(mean [D], covariance [D, D], schedule) → the optimal denoiser of data N(mean, covariance).

    The denoiser takes x_t [B, D, 1, 1].
    """
    def make_denoiser(mean, covariance, schedule):
        return Mixture([1.0], mean[None], covariance[None]).denoiser(schedule)

    return make_denoiser


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory):
    """A folder of models with random weights: pixels of size 32, and latents of size 64.

    No weight is zero, so that images are not constant.
    """
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for size, autoencoder in ((32, None), (64, Autoencoder(**presets.AUTOENCODER))):
        networks = presets.build_networks("".join(dish_names("train")), autoencoder)
        for parameter in networks[0].parameters():
            if parameter.abs().max() == 0:
                torch.nn.init.normal_(parameter, std=0.05)
        pretrained.save_model(folder, size, pretrained.Model(*networks, autoencoder))
    return folder


@pytest.fixture(autouse=True)
def separate_accelerator_state():
    """Reset the state that accelerate keeps per process: no test depends on another's precision."""
    def reset():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    reset()
    yield
    reset()
