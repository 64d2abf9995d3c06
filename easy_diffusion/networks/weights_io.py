"""Reading and writing weight files, with what is needed to rebuild the network.

Our own files are safetensors. A file holds a *tree*: dicts and lists whose leaves are tensors, numbers,
strings, booleans or None. The tensors become the file's tensors. The tree around them becomes JSON in the
file's header, with {"tensor": name} in the place of each tensor. `save_autoencoder` writes such a tree
with the sizes, scale and shift of the autoencoder, so that `load_autoencoder` needs nothing but the path.

Weight files of other projects come as safetensors or as pickles that `torch.save` wrote. A pickle can run
code when it is loaded; nothing here does: `read_tensors` uses `torch.load(weights_only=True)`, and
`open_tensors` reads the pickle without calling anything that it names.

The file needs torch and safetensors; `save_autoencoder` and `load_autoencoder` need autoencoder.py and
blocks.py beside it.

>>> import os, tempfile
>>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
>>> save_tree(path, {"step": 7, "weights": torch.nn.Linear(2, 3).state_dict()})
>>> tree = load_tree(path)
>>> tree["step"], tuple(tree["weights"]["weight"].shape)
(7, (3, 2))
>>> load_weights(torch.nn.Linear(2, 3), tree["weights"])
"""

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

HEADER = "easy_diffusion"               # the key of the tree's JSON in the safetensors metadata


# ---------------------------------------------------------------- our own files


def save_tree(path, tree) -> None:
    """Write a tree of tensors and plain values to one safetensors file.

    Raises TypeError for any other leaf, naming its place in the tree, and OSError if the disk is full.
    """
    tensors = {}
    header = {HEADER: json.dumps(flatten_tree(tree, tensors), ensure_ascii=False)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """Yield a temporary path to write to, which then replaces `path`: never half a file."""
    temporary = Path(f"{path}.writing")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except SafetensorError as error:    # what safetensors raises if the disk is full
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_tree(path, device="cpu"):
    """Read the tree that `save_tree` wrote, its tensors on `device`.

    Raises FileNotFoundError, or ValueError for a file that is damaged or has no tree in its header.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                raise ValueError(
                    f"{path} is a safetensors file, but not one that easy_diffusion wrote"
                )
            return unflatten_tree(json.loads(header), file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def flatten_tree(node, tensors: dict, place: str = ""):
    """Move the tensors of a tree into `tensors` by name; return the rest, which JSON can hold."""
    if isinstance(node, torch.Tensor):
        name = place or "tensor"
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(node, dict):          # a list of pairs, because JSON allows only strings as keys
        return {
            "dict": [
                [key, flatten_tree(value, tensors, f"{place}.{key}".strip("."))]
                for key, value in node.items()
            ]
        }
    if isinstance(node, (list, tuple)):
        if all(isinstance(value, (int, float)) for value in node):
            return list(node)
        return [
            flatten_tree(value, tensors, f"{place}.{i}".strip("."))
            for i, value in enumerate(node)
        ]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(
        f"a checkpoint holds tensors, numbers and text; at {place!r} there is a {type(node).__name__}"
    )


def unflatten_tree(node, file):
    """The inverse of `flatten_tree`; `file` is an open safetensors file."""
    if isinstance(node, list):
        return [unflatten_tree(value, file) for value in node]
    if isinstance(node, dict) and "tensor" in node:
        return file.get_tensor(node["tensor"])
    if isinstance(node, dict):
        return {key: unflatten_tree(value, file) for key, value in node["dict"]}
    return node


def load_weights(module: torch.nn.Module, state: dict) -> None:
    """`module.load_state_dict(state)`, after one ValueError that lists every mismatch.

    Named are all tensors that are missing, unexpected or of another shape. A value that is no tensor
    means that `state` is not a module's weights at all.
    """
    own = module.state_dict()
    kind = type(module).__name__
    no_tensor = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if no_tensor:
        raise ValueError(
            f"the file is not of a {kind}'s weights: at {no_tensor[0]!r} there is no tensor"
        )
    wrong = [f"missing: {name} {tuple(own[name].shape)}" for name in own.keys() - state.keys()]
    wrong += [
        f"unexpected: {name} {tuple(state[name].shape)}" for name in state.keys() - own.keys()
    ]
    wrong += [
        f"shape of {name}: {tuple(state[name].shape)} in the checkpoint, "
        f"{tuple(own[name].shape)} in the network"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint is of an incompatible {kind}:\n  " + "\n  ".join(sorted(wrong))
        )
    module.load_state_dict(state)


def save_autoencoder(path, autoencoder) -> None:
    """Write the weights, sizes, scale and shift of an Autoencoder to one file."""
    sizes = autoencoder.settings | {"channels": list(autoencoder.settings["channels"])}
    save_tree(path, {
        "autoencoder": sizes,
        "scale": autoencoder.scale,
        "shift": autoencoder.shift,
        "weights": autoencoder.state_dict(),
    })


def load_autoencoder(path):
    """Rebuild the Autoencoder that `save_autoencoder` wrote, in eval mode.

    Raises FileNotFoundError, or ValueError for a file of something else.
    """
    from .autoencoder import Autoencoder
    saved = load_tree(path)
    if not isinstance(saved, dict) or "autoencoder" not in saved:
        raise ValueError(f"{path} is a checkpoint, but not one of an autoencoder")
    sizes = dict(saved["autoencoder"])
    if "picture_channels" in sizes:     # the name before version 2
        sizes["image_channels"] = sizes.pop("picture_channels")
    autoencoder = Autoencoder(**sizes, scale=saved["scale"], shift=saved["shift"])
    load_weights(autoencoder, saved["weights"])
    return autoencoder.eval()


# ---------------------------------------------------------------- files of other projects


def read_tensors(path) -> dict[str, torch.Tensor]:
    """All named tensors of a `.safetensors` file or of a file that `torch.save` wrote.

    A checkpoint with its weights under "state_dict" gives those. Raises FileNotFoundError, or ValueError
    for a file that is damaged or holds objects that `weights_only=True` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def open_tensors(path) -> dict[str, Callable[[], torch.Tensor]]:
    """Name → function that reads the tensor: for large checkpoints of which only a part is wanted.

    Unlike `read_tensors` it skips whatever else a training has pickled into the file. Raises ValueError
    for a damaged file or one that is no checkpoint.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {name: partial(file.get_tensor, name) for name in file.keys()}
        return _open_pickle(path)
    except (
        SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, LookupError,
        ValueError, TypeError, AttributeError, RuntimeError,
    ) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error


def _open_pickle(path):
    """A file of `torch.save` is a zip: one pickle, and the bytes of each storage."""
    archive = zipfile.ZipFile(path)
    pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise ValueError("it is a zip file, but torch did not write it")
    tree = _TensorUnpickler(archive, pickled.removesuffix("data.pkl")).load()
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        raise ValueError("there are no tensors with names in it")
    return {
        name: reader for name, reader in tree.items()
        if isinstance(name, str) and isinstance(reader, partial)
    }


class _TensorUnpickler(pickle.Unpickler):
    """Reads a pickle without calling anything that it names.

    A tensor becomes a function that reads it, a dictionary stays one, everything else becomes a `Stub`.
    """

    DTYPES = {
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "FloatStorage": torch.float32,
        "DoubleStorage": torch.float64,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
    }

    class Stub:
        def __init__(self, *_, **__):
            pass

        def ignore(self, *_, **__):
            pass

        __setstate__ = __setitem__ = __call__ = append = extend = add = ignore

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive = archive
        self.folder = folder

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return partial(partial, self.read_tensor)       # called with a description, it keeps it
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return name if module == "torch" and name in self.DTYPES else self.Stub

    def persistent_load(self, description):
        _, storage_type, key, *_ = description
        return storage_type, key

    def read_tensor(self, storage, offset, size, stride, *_):
        storage_type, key = storage
        content = self.archive.read(f"{self.folder}data/{key}")             # also checks the CRC
        dtype = self.DTYPES[storage_type]
        if not content:
            return torch.empty(size, dtype=dtype)
        return torch.frombuffer(bytearray(content), dtype=dtype).as_strided(size, stride, offset)
