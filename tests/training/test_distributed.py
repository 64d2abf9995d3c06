import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, PrecisionType

from easy_diffusion.training.distributed import (
    check_gpu,
    compute_dtype,
    fast_precision,
    main_process_first,
)

ROOT = Path(__file__).parents[2]


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


# The process group gives up after 4 seconds; the main process works for 7.
PATIENCE = """
import sys, time
from datetime import timedelta
from pathlib import Path
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from easy_diffusion.training.distributed import main_process_first

group = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=4))
accelerator = Accelerator(cpu=True, kwargs_handlers=[group])
file = Path(sys.argv[1])

def prepare():
    if not file.exists():
        time.sleep(7)
        file.write_text(str(accelerator.process_index), "utf-8")
    return file.read_text("utf-8")

prepared_by = main_process_first(accelerator, prepare, seconds=0.2)
sys.stdout.write(f"prepared by {prepared_by}\\n")  # one write: lines of two processes do not mix
"""


def test_processes_wait_longer_than_the_process_group_allows(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PATIENCE, "utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        str(program), str(tmp_path / "prepared"),
    ]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])
    }
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("prepared by 0") == 2


def test_one_process_calls_the_function_at_once():
    assert main_process_first(Accelerator(cpu=True), lambda: "prepared") == "prepared"


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
