"""Training is tested on the CPU, also where there is a GPU; test_on_gpu.py tests the GPU."""

import pytest
import torch


@pytest.fixture
def gpu():
    """A test that asks for this fixture runs on the GPU, and only where there is one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def hide_gpu(request, monkeypatch):
    """Hide the GPU from this process and its children."""
    if "gpu" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
