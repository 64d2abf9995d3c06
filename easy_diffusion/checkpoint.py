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

import contextlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

HEADER = "easy_diffusion"


def save(path, tree, keep: int = 1, best: bool = False) -> None:
    """Write a tree of tensors and plain values; `keep` files stay: this one, and those before it as path.1, path.2, …; best: this one also
    as path.best, which is there first: a run killed in between goes on from the one before, and comes to this one again.

    Raises TypeError for a leaf of another kind, naming its place; OSError where the disk is full, and then nothing has changed."""
    tensors = {}
    skeleton = _take_apart(tree, tensors, "")
    with replacing(path) as beside:
        try:
            save_file(tensors, beside, metadata={HEADER: json.dumps(skeleton, ensure_ascii=False)})
        except SafetensorError as error:                                    # its name for what the system would not write
            raise OSError(f"{path} could not be written: {error}") from error
        if best:
            name_too(beside, f"{path}.best")
        if keep > 1 and whole(path):                                        # a damaged one would take a good one's place
            for i in range(keep - 1, 1, -1):
                if Path(f"{path}.{i - 1}").exists():
                    os.replace(f"{path}.{i - 1}", f"{path}.{i}")
            name_too(path, f"{path}.1")


def name_too(path, other) -> None:
    """Give a file another name, too, which takes no room; where the disk cannot do that, a copy."""
    with replacing(other) as beside:
        try:
            os.link(path, beside)
        except OSError:
            shutil.copyfile(path, beside)


def whole(path) -> bool:
    """Whether there is a safetensors file of the length that its header tells."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """A name in a folder beside `path` to write a file under. At the end it takes the path's place, whole and on the disk; if writing
    breaks off, it goes, and what stood at the path stays. What a killed process has left in the folder goes with the next call."""
    path = Path(path)
    folder = path.with_name(f"{path.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        with open(folder / path.name, "rb") as written:
            os.fsync(written.fileno())
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(path, device="cpu"):
    """The tree that `save` was given, its tensors on `device`.

    Raises FileNotFoundError, or ValueError for a file that is damaged or was not written by `save`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                raise ValueError(f"{path} is a safetensors file, but not one that easy_diffusion wrote")
            return _put_together(json.loads(header), file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def load_newest(path, device="cpu"):
    """`load`, but where the file is damaged the newest whole one of those kept before it, or else the best, with a warning that says so."""
    try:
        return load(path, device)
    except ValueError as damage:
        kept = itertools.takewhile(Path.exists, (Path(f"{path}.{i}") for i in itertools.count(1)))
        for before in (*kept, Path(f"{path}.best")):
            if whole(before):
                warnings.warn(f"{damage}; the run goes on from the checkpoint before it, {before}", stacklevel=2)
                return load(before, device)
        raise


def load_into(module: torch.nn.Module, state: dict) -> None:
    """module.load_state_dict, after one error (ValueError) that names all tensors that are missing, unknown or misshapen, or says that
    these are not a module's weights at all."""
    own = module.state_dict()
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ValueError(f"the file is not of a {type(module).__name__}'s weights: at {strange[0]!r} there is no tensor")
    wrong = [f"missing: {name} {tuple(own[name].shape)}" for name in own.keys() - state.keys()]
    wrong += [f"unknown: {name} {tuple(state[name].shape)}" for name in state.keys() - own.keys()]
    wrong += [f"shape of {name}: {tuple(state[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the network"
              for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        raise ValueError(f"the checkpoint is of another {type(module).__name__}:\n  " + "\n  ".join(sorted(wrong)))
    module.load_state_dict(state)


def _take_apart(node, tensors, place):
    if isinstance(node, torch.Tensor):
        name = place or "tensor"
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(node, dict):          # as a list of pairs: JSON's own keys could only be strings
        return {"dict": [[key, _take_apart(value, tensors, f"{place}.{key}".strip("."))] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        if all(isinstance(value, (int, float)) for value in node):
            return list(node)
        return [_take_apart(value, tensors, f"{place}.{i}".strip(".")) for i, value in enumerate(node)]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"a checkpoint holds tensors, numbers and text; at {place!r} there is a {type(node).__name__}")


def _put_together(node, file):
    if isinstance(node, list):
        return [_put_together(value, file) for value in node]
    if isinstance(node, dict) and "tensor" in node:
        return file.get_tensor(node["tensor"])
    if isinstance(node, dict):
        return {key: _put_together(value, file) for key, value in node["dict"]}
    return node
