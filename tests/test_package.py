"""The house keeps its promises: each file copies out, and floors import only what lies below them."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("easy_diffusion", "datasets") for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")
ORDER = ["schedule", "samplers", "score_sde", "flow_matching", "diffusion", "batches", "blocks", "checkpoint", "stable_diffusion", "unet",
         "autoencoder", "text", "finetune_cn_clip",
         "muon", "run", "guard", "train", "autoencoder_loss", "train_autoencoder", "watch",
         "camera", "inpaint", "latent", "animate", "metrics", "sd_painter", "recipe", "demo", "train_dishes", "dish_shapes", "dishes",
         "lmdb_store", "caption_states", "aipos", "aipos_lmdb", "pokemon_lmdb", "latents_lmdb"]
GROUND = {"schedule", "batches", "guard", "watch", "blocks", "camera", "checkpoint", "text", "samplers", "score_sde", "lmdb_store"}
ROOF = {"recipe", "demo", "train_dishes"}


def imported(path):
    """The files of the same folder that a module imports."""
    return {node.module or name.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1 for name in node.names}


def named(path):
    """The files of the same folder that its docstring names."""
    words = re.findall(r"\b(\w+)\.py\b", ast.get_docstring(ast.parse(path.read_text())))
    return {word for word in words if (path.parent / f"{word}.py").exists()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_module_copies_out_and_its_example_runs(path, tmp_path):
    """Into a folder of another name, with the files that its docstring names alone; its example gives what it says."""
    if path.stem in ROOF:                                   # they name the whole house
        for folder in ("easy_diffusion", "datasets"):
            shutil.copytree(ROOT / folder, tmp_path / folder)
        module = f"easy_diffusion.{path.stem}"
    else:
        (tmp_path / "copied").mkdir()
        for name in named(path) | {path.stem}:
            shutil.copy(path.parent / f"{name}.py", tmp_path / "copied")
        module = f"copied.{path.stem}"
    program = ("import doctest, importlib, sys\n"
               f"result = doctest.testmod(importlib.import_module('{module}'))\n"
               "assert result.attempted > 0, 'no example'\n"
               "sys.exit(result.failed)")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_floors(path):
    text = path.read_text()
    assert all(ORDER.index(name) < ORDER.index(path.stem) for name in imported(path)), "a file imports only files below it"
    if path.stem in GROUND:
        assert not imported(path)
    if path.stem not in ROOF:
        other = {"easy_diffusion": "datasets", "datasets": "easy_diffusion"}[path.parent.name]
        assert not re.search(rf"^\s*(from|import) {other}\b", text, re.M)
        assert not ROOF & imported(path) and imported(path) <= named(path)
    assert not re.search(rf"^\s*(from|import) {path.parent.name}\b", text, re.M), "inside a folder imports are relative"
