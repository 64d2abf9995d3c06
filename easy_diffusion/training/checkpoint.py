"""Checkpoints: the whole state of a training in one safetensors file, written atomically.

A checkpoint is a tree: dicts and lists whose leaves are tensors, numbers, strings, booleans or
None. That is what `state_dict()` of networks and optimizers returns. The tensors are stored as the
file's tensors, and the tree around them as JSON in the file's header; nothing is pickled (see
weights_io.py in networks/). While a checkpoint is replaced, there is always the old file or the new
one, never an incomplete one.

    path            the newest checkpoint
    path.1, path.2  the ones before, newest first, `keep` files in all
    path.best       the one with the lowest loss

If the newest file is damaged, `load_newest_checkpoint` takes the newest that is not. The file
needs torch, accelerate, safetensors, the folder networks/ and, beside it, data_loader.py and
distributed.py.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
>>> save_checkpoint(path, {"step": 7, "network": torch.nn.Linear(2, 3).state_dict()})
>>> tree = load_checkpoint(path)
>>> tree["step"], tuple(tree["network"]["weight"].shape)
(7, (3, 2))
>>> save_checkpoint(path, {"step": 8}, keep=2)
>>> load_newest_checkpoint(path), load_checkpoint(f"{path}.1")["step"]
({'step': 8}, 7)
"""

import contextlib
import itertools
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..networks.weights_io import (
    atomic_path,
    check_settings,
    load_tree,
    load_weights,
    write_tree,
)
from .data_loader import images_per_step
from .distributed import default_device

# ---------------------------------------------------------------- writing


def save_checkpoint(path, tree, keep: int = 1, best: bool = False) -> None:
    """Write a tree of tensors and plain values.

    path: the file, which is replaced.
    tree: dicts and lists of tensors, numbers, strings, booleans and None.
    keep: number of files that remain: this one and the previous ones as path.1, path.2, …
    best: also store it as path.best. This happens first: if the process is killed in between, the
        training resumes from the previous checkpoint and writes this one again.

    Raises TypeError for any other leaf, naming its position in the tree, and OSError if the disk
    is full. In both cases the file at `path` is unchanged.
    """
    with atomic_path(path) as temporary:
        write_tree(temporary, tree)
        if best:
            link_or_copy(temporary, f"{path}.best")
        if keep > 1 and is_intact(path):    # a damaged file must not replace an intact one
            for i in range(keep - 1, 1, -1):
                if Path(f"{path}.{i - 1}").exists():
                    os.replace(f"{path}.{i - 1}", f"{path}.{i}")
            link_or_copy(path, f"{path}.1")


def link_or_copy(path, other) -> None:
    """Give a file a second name: a hard link, which takes no space, or else a copy."""
    with atomic_path(other) as temporary:
        try:
            os.link(path, temporary)
        except OSError:                     # the file system has no hard links
            shutil.copyfile(path, temporary)


def save_or_warn(path, tree, keep: int = 1, best: bool = False) -> str:
    """Save the checkpoint of a training; return "" or, if the disk refused it, a warning.

    After a failed write the previous checkpoint is still there, so the training can continue.

    path, tree, keep: as for `save_checkpoint`; tree["index"] is the number of finished steps.
    best: whether this checkpoint has the lowest loss. With keep > 1 it is then stored as path.best,
        and so is the first one.

    Raises OSError if nothing could be written and there is no previous checkpoint.
    """
    try:
        is_best = keep > 1 and (best or not Path(f"{path}.best").exists())
        save_checkpoint(path, tree, keep, best=is_best)
        return ""
    except OSError as error:
        if not Path(path).exists():
            raise
        step = tree["index"] - 1
        return (
            f"the checkpoint after step {step} could not be written; the previous one is kept "
            f"and the training continues: {error}"
        )


# ---------------------------------------------------------------- reading


def load_checkpoint(path, device="cpu"):
    """Read the tree that `save_checkpoint` wrote, its tensors on `device`.

    Raises FileNotFoundError, or ValueError for a file that is damaged or that `save_checkpoint`
    did not write.
    """
    return rename_old_keys(load_tree(path, device))


def load_newest_checkpoint(path, device="cpu"):
    """Like `load_checkpoint`, but a damaged file is replaced by another one, with a warning.

    The replacement is the newest intact one of path.1, path.2, …, or else path.best. If none is
    intact, ValueError is raised as by `load_checkpoint`.
    """
    try:
        return load_checkpoint(path, device)
    except ValueError as error:
        numbered = (Path(f"{path}.{i}") for i in itertools.count(1))
        previous = itertools.takewhile(Path.exists, numbered)
        for candidate in (*previous, Path(f"{path}.best")):
            with contextlib.suppress(FileNotFoundError, ValueError):
                tree = load_checkpoint(candidate, device)
                warnings.warn(
                    f"{error}; training resumes from an earlier checkpoint, {candidate}",
                    stacklevel=2,
                )
                return tree
        raise


def is_intact(path) -> bool:
    """Whether the file exists, is a safetensors file, and is as long as its header says.

    The tensors are not read, so that their checksum is not compared.
    """
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def check_compatible(path, saved, optimizers: list, images_per_step: int | None) -> None:
    """Raise ValueError, naming the difference, unless this training can resume from a checkpoint.

    path, saved: the checkpoint's file, for the message, and its tree.
    optimizers: the optimizers of this training.
    images_per_step: in all processes, or None if not known. It must be the saved one, because the
        position in the epoch follows from the number of steps.
    """
    if not isinstance(saved, dict) or "health" not in saved:
        raise ValueError(
            f"{path} is not a checkpoint of `train`, or one of an unsupported earlier version"
        )
    if len(saved["optimizers"]) != len(optimizers):
        was = "with" if len(optimizers) == 1 else "without"
        raise ValueError(
            f"{path} was trained {was} Muon: resume {was} a muon_learning_rate"
        )
    was = saved.get("images_per_step")
    if was is not None and images_per_step is not None and was != images_per_step:
        raise ValueError(
            f"{path} was trained with {was} images per step, not {images_per_step}: "
            f"resume with {was}"
        )


def check_network(saved: dict, network, prediction_type: str) -> None:
    """Raise ValueError unless a checkpoint's weights belong to such a network.

    saved: the tree of a checkpoint. Its "network_settings" are compared with `network.settings`,
        if both exist.
    prediction_type: of the diffusion, such as "eps" or "v".
    """
    if saved["prediction_type"] != prediction_type:
        raise ValueError(
            f"the network was trained to predict {saved['prediction_type']}, not {prediction_type}"
        )
    if saved.get("network_settings") and hasattr(network, "settings"):
        check_settings(saved["network_settings"], network)


def load_ema_weights(network, encoder, diffusion, saved: dict) -> None:
    """Load a checkpoint's EMA weights, ready for sampling: eval mode, on the GPU if there is one.

    network, encoder: modules of the same settings as those that were trained; changed in place.
    diffusion: has the prediction type that the network was trained with.
    saved: the tree of a checkpoint of `train`.

    Raises ValueError, naming the difference, if the weights belong to another network or to another
    prediction type. A checkpoint of an earlier version has no settings, which then go unchecked.
    """
    check_network(saved, network, diffusion.prediction_type)
    models = torch.nn.ModuleDict({"network": network, "encoder": encoder})
    load_weights(models, saved["ema"])
    models.eval().to(default_device())


# ---------------------------------------------------------------- the state of a Trainer


def stateful_parts(trainer) -> dict:
    """The parts of a Trainer that are stored under their names with their own `state_dict`."""
    parts = {"health": trainer.health, "timesteps": trainer.options.timesteps}
    if trainer.scaler.is_enabled():
        parts["scaler"] = trainer.scaler
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def save_training(trainer) -> str:
    """Write the checkpoint of a Trainer; return "" or, if the disk refused it, a warning."""
    history = trainer.history
    safety = trainer.options.safety
    window_loss = history.window_mean(trainer.options.plateau.window)
    lowest_loss = min(window_loss, history.lowest_loss)
    tree = {
        "models": trainer.models.state_dict(),
        "ema": trainer.ema_models.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer, _ in trainer.optimizers.adamw],
        "phase": trainer.optimizers.phase,
        "index": trainer.clock.index,
        "seconds": trainer.clock.seconds,
        "progress": trainer.clock.progress,
        "prediction_type": trainer.diffusion.prediction_type,
        "network_settings": getattr(trainer.models["network"], "settings", None),
        "images_per_step": images_per_step(trainer.loader, trainer.world_size),
    }
    tree |= trainer.micro_batches.state_dict()
    tree |= history.state_dict() | {"lowest_loss": lowest_loss}
    tree |= {name: part.state_dict() for name, part in stateful_parts(trainer).items()}
    is_best = window_loss < history.lowest_loss
    warning = save_or_warn(safety.checkpoint, tree, safety.keep, best=is_best)
    if not warning:
        history.lowest_loss = lowest_loss
    return warning


def load_training(trainer) -> None:
    """Read the checkpoint into a Trainer. Raises ValueError if they are incompatible."""
    path = trainer.options.safety.checkpoint
    saved = load_newest_checkpoint(path)
    check_compatible(
        path,
        saved,
        trainer.optimizers.adamw,
        images_per_step(trainer.loader, trainer.world_size),
    )
    check_network(saved, trainer.models["network"], trainer.diffusion.prediction_type)
    load_weights(trainer.models, saved["models"])
    load_weights(trainer.ema_models, saved["ema"])
    for (optimizer, _), state in zip(trainer.optimizers.adamw, saved["optimizers"]):
        optimizer.load_state_dict(state)
    parts = stateful_parts(trainer)
    for name in parts.keys() & saved.keys():
        parts[name].load_state_dict(saved[name])
    trainer.history.load_state_dict(saved)
    trainer.micro_batches.load_state_dict(saved)
    trainer.optimizers.phase = saved["phase"]
    trainer.clock.start(saved["index"], saved["seconds"])


# ---------------------------------------------------------------- checkpoints of earlier versions

OLD_KEYS = {
    # of the whole training
    "average": "ema",
    "predicts": "prediction_type",
    "pictures": "images_per_step",
    "pieces": "micro_batches",
    "halved": "micro_batches_doubled",
    "guard": "health",
    "smooth": "smooth_loss",
    "quartiles": "quartile_losses",
    "lowest": "lowest_loss",
    # of TrainingHealth
    "rescued": "rollbacks",
    "copied_at": "snapshot_step",
    "last_bad": "last_bad_step",
    "ill": "unhealthy",
    "trouble": "reason",
    "lower": "lr_scale",
    "level": "snapshot_loss",
    "copy": "snapshot",
    # of ImportanceTimesteps
    "drawn": "counts",
}


def rename_old_keys(tree):
    """The tree with the keys of this version; a tree of an earlier version has others."""
    if not isinstance(tree, dict):
        return tree
    tree = {OLD_KEYS.get(key, key): value for key, value in tree.items()}
    for part in ("health", "timesteps", "models"):
        if isinstance(tree.get(part), dict):
            tree[part] = {OLD_KEYS.get(key, key): value for key, value in tree[part].items()}
    if tree.get("prediction_type") == "noise":
        tree["prediction_type"] = "eps"
    return tree
