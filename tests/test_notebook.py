"""The first cell of the notebooks, and the progress bars of executed ones."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from easy_diffusion import notebook
from easy_diffusion.notebook import finish_progress_bars, start_notebook

ROOT = Path(__file__).parents[1]


def test_the_first_call_returns_the_device_and_a_folder(capsys):
    device, out = start_notebook("half a minute")
    assert device in ("cpu", "cuda", "mps")
    assert out == ROOT / "out" and out.is_dir()
    assert capsys.readouterr().out.strip().endswith("half a minute")


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    find = importlib.util.find_spec
    missing = {"lmdb", "imageio_ffmpeg"}
    monkeypatch.setattr(
        notebook.importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    with pytest.raises(ImportError, match="%pip install lmdb imageio-ffmpeg$"):
        start_notebook("half a minute")


def test_a_repository_that_cannot_be_written_leaves_the_files_in_the_current_folder(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(notebook.os, "access", lambda path, mode: False)
    monkeypatch.chdir(tmp_path)
    assert start_notebook("half a minute")[1] == tmp_path / "out"


# The first lines of the first cell, from a folder inside the repository, or from one that holds it.
@pytest.mark.parametrize("place", [".", "ipynb", "..", "kaggle"])
def test_the_first_cell_finds_the_repository(tmp_path, place):
    repository = tmp_path / "easy_diffusion"            # a clone's folder has the package's name
    (repository / "easy_diffusion").mkdir(parents=True)
    (repository / "easy_diffusion" / "presets.py").touch()
    (repository / "ipynb").mkdir()
    first = nbformat.read(ROOT / "ipynb" / "01_quickstart.ipynb", 4)
    source = next(cell.source for cell in first.cells if cell.cell_type == "code")
    source = source.split("from easy_diffusion")[0]
    folder = repository / place
    if place == "kaggle":
        folder = tmp_path / "working"
        folder.mkdir()
        source = source.replace("/kaggle/input", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", source + "\nprint(root.resolve())"],
        cwd=folder, capture_output=True, encoding="utf-8",
    )
    assert done.stdout.strip() == str(repository.resolve()), done.stderr


def widget(**state):
    return {"state": state}


def test_a_progress_bar_is_replaced_by_its_last_state():
    models = {
        "box": widget(children=["IPY_MODEL_left", "IPY_MODEL_bar", "IPY_MODEL_right"]),
        "left": widget(value="training: 100%"),
        "bar": widget(value=30.0, max=30.0),
        "right": widget(value="\u200730/30\u2007[00:12&lt;00:00,  2.5it/s]"),
    }
    output = nbformat.v4.new_output("display_data", {
        "text/plain": "training:   0%|          | 0/30 [00:00<?, ?it/s]",
        "application/vnd.jupyter.widget-view+json": {"model_id": "box"},
    })
    executed = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("train()", outputs=[output])],
        metadata={"widgets": {"application/vnd.jupyter.widget-state+json": {"state": models}}},
    )
    finish_progress_bars(executed)
    assert executed.cells[0].outputs[0].data == {
        "text/plain": "training: 100% ██████████ 30/30 [00:12<00:00,  2.5it/s]"
    }
    assert "widgets" not in executed.metadata


def test_a_notebook_without_progress_bars_stays():
    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    before = executed.copy()
    finish_progress_bars(executed)
    assert executed == before
