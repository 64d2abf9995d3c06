"""Reading and writing weight files, with what is needed to rebuild the network.

Our own files are safetensors. A file holds a *tree*: dicts and lists whose leaves are tensors,
numbers, strings, booleans or None. The tensors become the tensors of the file. The rest of the tree
becomes JSON in the header of the file, with {"tensor": name} in place of each tensor. A file can
therefore hold the weights of a network together with the arguments that rebuild the network. A
checksum of the tensors, also in the header, is compared when the file is read.

Weight files of other projects are either safetensors or pickles that `torch.save` wrote. A pickle
can run code when it is loaded. Nothing here lets it: `read_tensors` uses
`torch.load(weights_only=True)`, and `open_tensors` reads the pickle without calling anything that
it names.

The file needs torch and safetensors.

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
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

# What safetensors, zipfile and the readers of pickles raise for a file of random bytes.
READ_ERRORS = (
    SafetensorError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    struct.error,
)
HEADER = "easy_diffusion"  # the key of the tree's JSON in the metadata of the safetensors file


# ---------------------------------------------------------------- our own files


def save_tree(path, tree) -> None:
    """Write a tree of tensors and plain values to one safetensors file.

    Raises TypeError for any other leaf, naming its place in the tree, and OSError if the disk is
    full. In both cases a file that was at `path` before stays as it was.
    """
    with atomic_path(path) as temporary:
        write_tree(temporary, tree)


def write_tree(temporary: Path, tree) -> None:
    """Write a tree to the temporary path that `atomic_path` yields; errors as for `save_tree`."""
    tensors = {}
    header = {"tree": flatten_tree(tree, tensors), "checksum": compute_checksum(tensors)}
    save_file(tensors, temporary, metadata={HEADER: json.dumps(header, ensure_ascii=False)})


def compute_checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Return the CRC-32 of the bytes of all tensors, which are on the CPU, as hexadecimal digits.

    A disk or a transfer that has changed some bytes is found; there is no defence against intent.
    """
    checksum = 0
    for name in sorted(tensors):
        content = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(content, checksum)
    return f"{checksum:08x}"


def compute_weights_checksum(network: torch.nn.Module) -> str:
    """The checksum of a network's weights, rounded to half precision."""
    state = network.state_dict()
    return compute_checksum({name: tensor.cpu().half() for name, tensor in state.items()})


def check_unet(path, checksum: str, unet: torch.nn.Module) -> None:
    """Raise ValueError unless the file `path` was made for this UNet.

    checksum: `compute_weights_checksum` of the UNet that it was made for, as the file holds it.
    """
    if checksum != compute_weights_checksum(unet):
        raise ValueError(f"{path} was trained for a UNet with other weights than this one")


@contextlib.contextmanager
def atomic_path(path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` on success and is removed on an error.

    The temporary file is in a folder of its own beside `path`. A killed process leaves the folder
    behind. The next call for the same `path` removes it.
    """
    path = Path(path)
    folder = path.with_name(f"{path.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        # Windows flushes only a file that is open for writing, hence "r+b" and not "rb".
        with open(folder / path.name, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(folder / path.name, path)
    except SafetensorError as error:  # what safetensors raises if the disk is full
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_tree(path, device="cpu"):
    """Read the tree that `save_tree` wrote, its tensors on `device`.

    Raises FileNotFoundError, or ValueError for a file that is damaged or has no tree in its header.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if HEADER not in metadata:
                raise ValueError(
                    f"{path} is a safetensors file, but not one that easy_diffusion wrote"
                )
            # Copies, so that the file does not stay mapped: Windows cannot replace a mapped file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    tree = json.loads(metadata[HEADER])
    if isinstance(tree, dict) and "checksum" in tree:  # a file of an earlier version has none
        if tree["checksum"] != compute_checksum(tensors):
            raise ValueError(f"{path} is damaged: the checksum of its tensors is another one")
        tree = tree["tree"]
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return unflatten_tree(tree, tensors)


def flatten_tree(node, tensors: dict, name: str = ""):
    """Move the tensors of a tree into the dict `tensors`; return the rest, which JSON can hold.

    name: the keys that lead to this node, joined by dots. It becomes the name of the tensor.
    """
    if isinstance(node, torch.Tensor):
        name = name or "tensor"
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(node, dict):
        # A list of pairs, because JSON allows only strings as keys
        pairs = []
        for key, value in node.items():
            pairs.append([key, flatten_tree(value, tensors, f"{name}.{key}".strip("."))])
        return {"dict": pairs}
    if isinstance(node, (list, tuple)):
        if all(isinstance(value, (int, float)) for value in node):
            return list(node)
        return [
            flatten_tree(value, tensors, f"{name}.{i}".strip(".")) for i, value in enumerate(node)
        ]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(
        "a checkpoint holds tensors, numbers, strings, booleans and None; "
        f"at {name!r} there is a value of type {type(node).__name__}"
    )


def unflatten_tree(node, tensors: dict):
    """The inverse of `flatten_tree`."""
    if isinstance(node, list):
        return [unflatten_tree(value, tensors) for value in node]
    if isinstance(node, dict) and "tensor" in node:
        return tensors[node["tensor"]]
    if isinstance(node, dict):
        return {key: unflatten_tree(value, tensors) for key, value in node["dict"]}
    return node


def load_weights(module: torch.nn.Module, state: dict) -> None:
    """`module.load_state_dict(state)`, but a ValueError lists all mismatches at once.

    The list names each tensor that is missing, unexpected or of a different shape. A value that is
    not a tensor means that `state` is not a state dict at all, which is a ValueError, too.
    """
    expected = module.state_dict()
    class_name = type(module).__name__
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"the file is not of a {class_name}'s weights: at {name!r} there is no tensor"
            )
    mismatches = [
        f"missing: {name} {tuple(expected[name].shape)}" for name in expected.keys() - state.keys()
    ]
    mismatches += [
        f"unexpected: {name} {tuple(state[name].shape)}" for name in state.keys() - expected.keys()
    ]
    mismatches += [
        f"shape of {name}: {tuple(state[name].shape)} in the checkpoint, "
        f"{tuple(expected[name].shape)} in the network"
        for name in expected.keys() & state.keys()
        if expected[name].shape != state[name].shape
    ]
    if mismatches:
        raise ValueError(
            f"the checkpoint is of an incompatible {class_name}:\n  "
            + "\n  ".join(sorted(mismatches))
        )
    module.load_state_dict(state)


# Settings that change the training of a network, but not what it computes with given weights
TRAINING_SETTINGS = ("dropout", "checkpointing")


def check_settings(saved: dict, network: torch.nn.Module) -> None:
    """Raise ValueError, naming each difference, unless saved weights belong to such a network.

    saved: the settings of the network whose weights were saved, as a file holds them.
    network: has an attribute `settings`, the dict of its constructor's arguments.

    Weights of the same shapes can belong to different networks: with another number of heads, for
    example, they load, but compute something else. Tuples and lists count as equal. Ignored are
    TRAINING_SETTINGS, and settings that the file does not have, since an earlier version wrote it.
    """
    differences = []
    for name, value in saved.items():
        if name in TRAINING_SETTINGS:
            continue
        own = network.settings.get(name)
        if _tuples_to_lists(own) != _tuples_to_lists(value):
            differences.append(f"{name}: {value} in the checkpoint, {own} in the network")
    if differences:
        raise ValueError(
            f"the checkpoint is of a {type(network).__name__} with other settings:\n  "
            + "\n  ".join(differences)
        )


def _tuples_to_lists(value):
    """JSON has no tuples: `save_tree` writes them as lists."""
    return [_tuples_to_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------- files of other projects


def save_tensors(path, tensors: dict[str, torch.Tensor]) -> None:
    """Write named, contiguous tensors as a safetensors file for other projects.

    Raises OSError if the disk is full; a file that was at `path` before then stays as it was.
    """
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def read_tensors(path) -> dict[str, torch.Tensor]:
    """All named tensors of a `.safetensors` file or of a file that `torch.save` wrote.

    If a checkpoint keeps its weights under "state_dict", only these are returned. Raises
    FileNotFoundError, or ValueError for a file that is damaged or holds objects that
    `torch.load(weights_only=True)` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            # Copies, so that the file does not stay mapped.
            state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (*READ_ERRORS, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def open_tensors(path) -> dict[str, Callable[[], torch.Tensor]]:
    """Name → function that reads the tensor, for a large checkpoint of which a part is needed.

    Unlike `read_tensors`, it skips other objects that a training framework has pickled into the
    file. Raises ValueError for a file that is damaged or not a checkpoint.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {name: partial(file.get_tensor, name) for name in file.keys()}
        return _open_pickle(path)
    except READ_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from error


def _open_pickle(path):
    """Open a file of `torch.save`: a zip archive of one pickle and the bytes of each storage."""
    archive = zipfile.ZipFile(path)
    pickle_name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if pickle_name is None:
        raise ValueError("it is a zip file, but torch did not write it")
    tree = _TensorUnpickler(archive, pickle_name.removesuffix("data.pkl")).load()
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        raise ValueError("there are no tensors with names in it")
    return {
        name: read
        for name, read in tree.items()
        if isinstance(name, str) and isinstance(read, partial)
    }


class _TensorUnpickler(pickle.Unpickler):
    """Reads a pickle without calling anything that it names.

    A tensor becomes a function that reads it. A dict stays a dict. All else becomes a `Stub`.
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
        """Stands for any other object; it accepts all that a pickle does to an object."""

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
            # The unpickler calls this with the tensor's description; the call returns
            # partial(self.read_tensor, *description), which reads the tensor when it is called.
            return partial(partial, self.read_tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in self.DTYPES:
            return name
        return self.Stub

    def persistent_load(self, description):
        _, storage_type, key, *_ = description
        return storage_type, key

    def read_tensor(self, storage, offset, size, stride, *_):
        storage_type, key = storage
        content = self.archive.read(f"{self.folder}data/{key}")  # this also checks the CRC
        dtype = self.DTYPES[storage_type]
        if not content:
            return torch.empty(size, dtype=dtype)
        return torch.frombuffer(bytearray(content), dtype=dtype).as_strided(size, stride, offset)
