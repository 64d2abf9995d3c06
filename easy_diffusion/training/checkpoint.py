"""Everything a run must remember, in one safetensors file; no pickle, written to the side and renamed.

A checkpoint is a tree of dicts and lists whose leaves are tensors, numbers, strings, booleans or None, which is what
`state_dict()` of networks and optimizers returns. The tensors become the file's tensors; the tree around them becomes
JSON in the file's header, with {"tensor": name} where a tensor stood. Whoever reads the file while it is replaced sees
the old one or the new one, never half of one. With `keep` the ones before stay beside it, under its name with .1, .2, …,
and `load_newest` takes the newest that is whole. The file needs torch and safetensors.

>>> import tempfile, os
>>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
>>> save(path, {"step": 7, "network": torch.nn.Linear(2, 3).state_dict()})
>>> tree = load(path)
>>> tree["step"], tuple(tree["network"]["weight"].shape)
(7, (3, 2))
>>> save(path, {"step": 8}, keep=2)
>>> load_newest(path), load(f"{path}.1")["step"]
({'step': 8}, 7)
"""

import itertools
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import atomic_path
from ..networks.weights_io import HEADER, flatten_tree, load_tree, load_weights


def save_checkpoint(path, tree, keep: int = 1, best: bool = False) -> None:
    """Write a tree of tensors and plain values; `keep` files stay: this one, and those before it as path.1, path.2, …; best: this one also
    as path.best, which is there first: a run killed in between goes on from the one before, and comes to this one again.

    Raises TypeError for a leaf of another kind, naming its place; OSError where the disk is full, and then nothing has changed."""
    tensors = {}
    skeleton = flatten_tree(tree, tensors)
    with atomic_path(path) as beside:
        try:
            save_file(tensors, beside, metadata={HEADER: json.dumps(skeleton, ensure_ascii=False)})
        except SafetensorError as error:                                    # its name for what the system would not write
            raise OSError(f"{path} could not be written: {error}") from error
        if best:
            link_or_copy(beside, f"{path}.best")
        if keep > 1 and is_intact(path):                                        # a damaged one would take a good one's place
            for i in range(keep - 1, 1, -1):
                if Path(f"{path}.{i - 1}").exists():
                    os.replace(f"{path}.{i - 1}", f"{path}.{i}")
            link_or_copy(path, f"{path}.1")


OLD_KEYS = {
    "average": "ema", "predicts": "prediction_type", "pictures": "images_per_step", "pieces": "micro_batches",
    "halved": "micro_batches_doubled", "guard": "health", "smooth": "smooth_loss", "quartiles": "quartile_losses",
    "lowest": "lowest_loss",
    # of the training's health
    "rescued": "rollbacks", "copied_at": "snapshot_step", "last_bad": "last_bad_step", "ill": "unhealthy", "trouble": "reason",
    "lower": "lr_scale", "level": "snapshot_loss", "copy": "snapshot",
    # of ImportanceTimesteps
    "drawn": "counts",
}


def rename_old_keys(tree):
    """A checkpoint of an earlier version, with the keys of this one."""
    if not isinstance(tree, dict):
        return tree
    tree = {OLD_KEYS.get(key, key): value for key, value in tree.items()}
    for part in ("health", "timesteps", "models"):
        if isinstance(tree.get(part), dict):
            tree[part] = {OLD_KEYS.get(key, key): value for key, value in tree[part].items()}
    if tree.get("prediction_type") == "noise":
        tree["prediction_type"] = "eps"
    return tree


def link_or_copy(path, other) -> None:
    """Give a file another name, too, which takes no room; where the disk cannot do that, a copy."""
    with atomic_path(other) as beside:
        try:
            os.link(path, beside)
        except OSError:
            shutil.copyfile(path, beside)


def is_intact(path) -> bool:
    """Whether there is a safetensors file of the length that its header tells."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def load_checkpoint(path, device="cpu"):
    """The tree that `save` was given, its tensors on `device`.

    Raises FileNotFoundError, or ValueError for a file that is damaged or was not written by `save`.
    """
    return rename_old_keys(load_tree(path, device))


def load_newest_checkpoint(path, device="cpu"):
    """`load`, but where the file is damaged the newest whole one of those kept before it, or else the best, with a warning that says so."""
    try:
        return load_checkpoint(path, device)
    except ValueError as damage:
        kept = itertools.takewhile(Path.exists, (Path(f"{path}.{i}") for i in itertools.count(1)))
        for before in (*kept, Path(f"{path}.best")):
            if is_intact(before):
                warnings.warn(f"{damage}; the run goes on from the checkpoint before it, {before}", stacklevel=2)
                return load_checkpoint(before, device)
        raise


def save_or_warn(path, tree, keep: int = 1, best: bool = False) -> str:
    """A checkpoint; "" or, if the disk would not take it, a sentence that says so: what was there before is still there. Where nothing
    could ever be written, that is an error (OSError). best: it is the best so far, kept as path.best if any but the newest are."""
    try:
        save_checkpoint(path, tree, keep, best=keep > 1 and (best or not Path(f"{path}.best").exists()))
        return ""
    except OSError as error:
        if not Path(path).exists():
            raise
        step = tree["index"] - 1
        return f"the checkpoint after step {step} could not be written, that of before stays, and the training goes on: {error}"


def check_compatible(path, saved, optimizers: list, prediction_type: str, pictures: int | None) -> None:
    """Whether a checkpoint of a training is of one like this; if not, ValueError says what was otherwise. pictures: of a step, in all
    processes, where that is known: with others the order would go on at another place."""
    if not isinstance(saved, dict) or "health" not in saved:
        raise ValueError(f"{path} is not of a training by this file, or of one by an earlier version")
    if len(saved["optimizers"]) != len(optimizers):
        was = "with" if len(optimizers) == 1 else "without"
        raise ValueError(f"{path} was trained {was} Muon, so muon_learning_rate must tell the same")
    if saved["prediction_type"] != prediction_type:
        raise ValueError(f"{path} was trained to predict {saved['prediction_type']}, not {prediction_type}")
    if (was := saved.get("images_per_step")) is not None and pictures is not None and was != pictures:
        raise ValueError(f"{path} is of a run with {was} pictures a step, not {pictures}: to go on, it must be as many")


def load_ema_weights(network, encoder, state: dict) -> None:
    """A checkpoint's EMA weights into network and encoder, ready to draw, on the GPU if there is one."""
    both = torch.nn.ModuleDict({"network": network, "encoder": encoder})
    load_weights(both, state)
    both.eval().to("cuda" if torch.cuda.is_available() else "cpu")
