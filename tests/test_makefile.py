"""What `make` installs for which GPU, and the programs' message for a GPU without kernels."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from easy_diffusion.training.distributed import check_gpu

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "capabilities, requirements, note",
    [
        ("7.0", "requirements-volta.txt", "too old for the newest PyTorch"),
        ("7.5", "requirements.txt", ""),
        ("9.0\n9.0", "requirements.txt", ""),
        ("6.1", "requirements.txt", "CUDA 12.6, of PyTorch 2.14 at most"),
        ("", "requirements.txt", ""),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_make_installs_the_pytorch_that_has_kernels_for_the_gpu(
    tmp_path, capabilities, requirements, note
):
    for name in ("Makefile", "requirements.txt", "requirements-common.txt",
                 "requirements-volta.txt", "requirements-app.txt"):
        shutil.copy(ROOT / name, tmp_path)
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    script = f"#!/bin/sh\nprintf '{capabilities}'\n" if capabilities else "#!/bin/false\n"
    program.write_text(script)
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["make", "--dry-run", ".venv/ready"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=True,
    )
    assert f" -r {requirements}\n" in done.stdout
    assert done.stdout.count("note: ") == bool(note)
    assert note in done.stdout


@pytest.mark.parametrize(
    "name, capability, way_out",
    [
        ("Tesla V100-SXM2-16GB", (7, 0), "install requirements-volta.txt"),
        ("NVIDIA GeForce GTX 1080", (6, 1), "https://download.pytorch.org/whl/cu126"),
        ("a later GPU", (13, 0), "install a newer PyTorch"),
    ],
)
def test_a_gpu_without_kernels_ends_the_program_with_one_sentence(
    monkeypatch, name, capability, way_out
):
    pretend_gpu(monkeypatch, name, capability, ["sm_75", "sm_80", "sm_90a", "sm_120"])
    with pytest.raises(SystemExit, match=way_out) as error:
        check_gpu()
    assert name in str(error.value)
    assert torch.__version__ in str(error.value)


@pytest.mark.parametrize(
    "capability, architectures",
    [((7, 5), ["sm_75"]), ((8, 9), ["sm_80"]), ((9, 0), ["sm_90a"]), ((13, 0), ["compute_120"])],
)
def test_a_gpu_with_kernels_passes(monkeypatch, capability, architectures):
    pretend_gpu(monkeypatch, "a GPU", capability, architectures)
    check_gpu()


def pretend_gpu(monkeypatch, name, capability, architectures):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
