"""`make` installs the PyTorch that has kernels for the GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

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
