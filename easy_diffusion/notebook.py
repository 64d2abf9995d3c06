"""What the first cell of each notebook calls, and what is done after its execution.

    start_notebook          checks the packages, chooses the device, sets matplotlib's fonts
    finish_progress_bars    replaces progress bars by their last state as text

`python -m easy_diffusion.notebook FILE.ipynb …` does the second to executed notebooks.

>>> device, out = start_notebook("no time at all")              # doctest: +ELLIPSIS
Python ... · torch ... · ... · no time at all
>>> out.name
'out'
"""

import html
import importlib.util
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# the name of a module → the name of the package that installs it
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "lmdb": "lmdb",
    "psutil": "psutil",
    "imageio": "imageio",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "mplfonts": "mplfonts",
}


def start_notebook(duration: str, also: dict[str, str] | None = None) -> tuple:
    """Check the packages, print the versions, and return (device, out).

    duration: text that says how long the notebook takes; it is printed.
    also: further modules that it needs, as in PACKAGES.

    device: "cuda", "mps" or "cpu". out: a folder for the notebook's files, the repository's `out/`,
    or the current folder's where the repository cannot be written. Raises ImportError, with the
    command to run, if a package is missing.
    """
    modules = PACKAGES | (also or {})
    missing = [modules[name] for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"packages are missing; run in a cell: %pip install {' '.join(missing)}")

    import matplotlib.pyplot as plt
    import torch
    from matplotlib import font_manager

    from .images import load_chinese_font
    from .training.distributed import default_device

    device = str(default_device())
    cores = f"{os.cpu_count()} CPU cores"
    hardware = {"cpu": cores, "mps": "Apple's GPU"}.get(device) or torch.cuda.get_device_name()
    version = torch.__version__.split("+")[0]
    print(f"Python {platform.python_version()} · torch {version} · {hardware} · {duration}")

    plt.rcParams["figure.dpi"] = 80
    font = load_chinese_font(12).path
    font_manager.fontManager.addfont(font)
    name = font_manager.FontProperties(fname=font).get_name()
    plt.rcParams["font.family"] = ["DejaVu Sans", name]       # the second for Chinese characters
    torch.manual_seed(0)
    out = ROOT / "out" if os.access(ROOT, os.W_OK) else Path.cwd() / "out"
    out.mkdir(exist_ok=True)
    return device, out



# ------------------------------------------------------------------ after the execution


def finish_progress_bars(notebook) -> None:
    """Replace the progress bars of an executed notebook by their last state as text.

    notebook: as `nbformat.read` returns it. Progress bars are widgets, of which many viewers show
    only the first one, an empty bar. All widgets are in the notebook's metadata; they are removed.
    """
    widgets = notebook.metadata.pop("widgets", {})
    models = widgets.get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            view = data.pop("application/vnd.jupyter.widget-view+json", None)
            if view and view["model_id"] in models:
                data["text/plain"] = widget_text(models, view["model_id"])


def widget_text(models: dict, name: str) -> str:
    """The text of a widget and of those inside it: "training: 100% ██████████ 30/30 [00:12…]"."""
    state = models[name]["state"]
    if "children" in state:
        children = (child.removeprefix("IPY_MODEL_") for child in state["children"])
        return " ".join(widget_text(models, child) for child in children).strip()
    if "max" in state:
        filled = round(10 * state["value"] / state["max"]) if state["max"] else 0
        return "█" * filled + "░" * (10 - filled)
    return html.unescape(state.get("value", "")).replace("\u2007", " ").strip()


if __name__ == "__main__":
    import nbformat

    for file in sys.argv[1:]:
        executed = nbformat.read(file, as_version=4)
        finish_progress_bars(executed)
        nbformat.write(executed, file)
