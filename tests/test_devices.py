"""Devices other than a CPU and an NVIDIA GPU: Windows' missing modules, Apple's GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from easy_diffusion.diffusion.flow_matching import RectifiedFlow
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.diffusion.timesteps import ImportanceTimesteps
from easy_diffusion.training.distributed import default_device

ROOT = Path(__file__).parents[1]
# Windows has neither of these modules.
WITHOUT_UNIX = """
import importlib, pkgutil, sys
import multiprocessing.popen_fork, psutil, subprocess, tempfile    # need them on Linux alone
sys.modules["resource"] = sys.modules["fcntl"] = None
import easy_diffusion, datasets
for package in (easy_diffusion, datasets):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(".app"):
            importlib.import_module(module.name)
from easy_diffusion.training.memory import peak_memory
print(peak_memory() > 10**7)
"""


def test_every_module_is_imported_without_the_modules_of_unix():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_UNIX], cwd=ROOT, capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    "cuda, mps, expected",
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_an_nvidia_gpu_comes_before_apples_and_that_before_the_cpu(
    monkeypatch, cuda, mps, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert default_device().type == expected


@pytest.fixture
def no_float64_on_devices(monkeypatch):
    """`Tensor.to` refuses to move float64, or to convert to it, on a device but the CPU."""
    move = torch.Tensor.to

    def checked_move(tensor, *arguments, **options):
        result = move(tensor, *arguments, **options)
        moved = result.device != tensor.device
        if result.device.type != "cpu" and (
            result.dtype == torch.float64 or (moved and tensor.dtype == torch.float64)
        ):
            raise TypeError("the device has no float64")
        return result

    monkeypatch.setattr(torch.Tensor, "to", checked_move)


def predict(x_t, t, context, mask):
    return x_t


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_no_float64_reaches_the_device_in_a_loss_and_a_prediction(
    no_float64_on_devices, prediction_type, variance
):
    """The meta device stands for Apple's GPU; it computes shapes alone."""
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(1000), prediction_type, variance)
    x = torch.zeros(2, 3, 8, 8, device="meta")

    def network(x_t, t, context, mask):
        return torch.cat([x_t, x_t], 1) if variance == "learned_range" else x_t

    for t in (torch.tensor([1, 999]), torch.tensor([1, 999], device="meta")):
        assert diffusion.loss(network, x, t).shape == (2,)
        assert diffusion.denoiser(network)(x, t).x0.shape == x.shape


def test_no_float64_reaches_the_device_with_a_flow_and_with_importance_sampling(
    no_float64_on_devices,
):
    x = torch.zeros(2, 3, 8, 8, device="meta")
    assert RectifiedFlow().loss(predict, x, torch.tensor([0.1, 0.9], device="meta")).shape == (2,)
    weights = ImportanceTimesteps(10).weights(torch.tensor([1, 2], device="meta"))
    assert weights.dtype == torch.float32
