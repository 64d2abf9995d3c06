import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, PrecisionType

from easy_diffusion.training.distributed import check_gpu, compute_dtype, fast_precision


def test_fast_precision_is_one_that_accelerate_knows():
    assert fast_precision() in PrecisionType.list()


def test_compute_dtype_is_that_of_autocast():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    assert compute_dtype(accelerator) == torch.bfloat16
    disabled = AutocastKwargs(enabled=False)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", kwargs_handlers=[disabled])
    assert compute_dtype(accelerator) == torch.float32
    AcceleratorState._reset_state()
    assert compute_dtype(Accelerator(cpu=True, mixed_precision="no")) == torch.float32


@pytest.mark.parametrize(
    "name, capability, advice",
    [
        ("Tesla V100-SXM2-16GB", (7, 0), "install requirements-volta.txt"),
        ("NVIDIA GeForce GTX 1080", (6, 1), "https://download.pytorch.org/whl/cu126"),
        ("a later GPU", (13, 0), "install a newer PyTorch"),
    ],
)
def test_a_gpu_without_kernels_ends_the_program_with_one_sentence(
    monkeypatch, name, capability, advice
):
    pretend_gpu(monkeypatch, name, capability, "no kernel image is available for execution")
    with pytest.raises(SystemExit, match=advice) as error:
        check_gpu()
    assert name in str(error.value)
    assert torch.__version__ in str(error.value)


def test_a_gpu_with_kernels_passes_and_another_error_is_not_hidden(monkeypatch):
    pretend_gpu(monkeypatch, "a GPU", (9, 0), None)
    check_gpu()
    pretend_gpu(monkeypatch, "a GPU", (9, 0), "the driver is too old")
    with pytest.raises(RuntimeError, match="driver"):
        check_gpu()


def pretend_gpu(monkeypatch, name, capability, error):
    """A GPU whose first operation raises RuntimeError(error), unless that is None."""
    zeros = torch.zeros

    def operate(*shape, device):
        assert device == "cuda"
        if error is not None:
            raise RuntimeError(f"CUDA error: {error}")
        return zeros(*shape)

    monkeypatch.setattr(torch, "zeros", operate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
