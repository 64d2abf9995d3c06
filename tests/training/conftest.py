"""Training is tested on the CPU, also where there is a GPU; test_on_gpu.py tests the GPU."""

import pytest
import torch


@pytest.fixture
def gpu():
    """A test that asks for this fixture runs on the GPU, and only where there is one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def train_on_cpu(request):
    if "gpu" not in request.fixturenames:
        request.getfixturevalue("hide_gpu")
