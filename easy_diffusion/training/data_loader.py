"""From a dataset to batches: shuffled, repeatable from any step on, in one process or several.

A batch is (images, captions), or (images, captions, extras) with more tensors by name, such as
{"control": [B, 3, H, W]}: a control image, a mask, a film. They reach the network as keyword
arguments. A dataset whose items are (image, caption, {"control": tensor}) gives such batches.

Order. The order of epoch e follows from (seed, e) alone. A training that stopped after step n
therefore resumes with exactly the batch of step n, with the same dataset and batch size, and uses
each image of the epoch once.

Randomness. What a dataset draws at random for a batch (a crop, a flip) follows from (seed, the
batch's position). Whether a worker or this process reads the batch, the generators of torch, numpy
and Python are seeded before and restored afterwards.

Several processes. With W processes, the k-th batches of all of them make up the k-th batch of a
single process with a batch W times as large.

Workers are processes that read images while the network trains. With CUDA they are spawned,
because a forked process cannot use CUDA ("Cannot re-initialize CUDA in forked subprocess"). A
spawned worker imports the main program again: a script needs `if __name__ == "__main__":`, and a
dataset's class must be in a file, not in a notebook's cell. Workers live as long as the loader;
the files that they have opened stay open from epoch to epoch. With CUDA the batches are in pinned
memory, from which the copy to the GPU is fastest. Images stay uint8 until they are on the device:
a quarter of the bytes of float32.

The file needs torch and numpy.

>>> dataset = torch.utils.data.TensorDataset(torch.arange(7))
>>> [len(batch) for batch, in make_loader(dataset, 2)]
[2, 2, 2]
>>> from_start = infinite_batches(make_loader(dataset, 2))
>>> resumed = infinite_batches(make_loader(dataset, 2), start=10)
>>> [next(from_start)[0].tolist() for _ in range(11)][10] == next(resumed)[0].tolist()
True
>>> ranks = [infinite_batches(make_loader(dataset, 2), rank=rank, world_size=2) for rank in (0, 1)]
>>> both = torch.cat([next(batches)[0] for batches in ranks])
>>> both.tolist() == next(infinite_batches(make_loader(dataset, 4)))[0].tolist()
True
>>> images, captions, extras = unpack_batch((torch.zeros(2, 3, 8, 8), ["红", "绿"]))
>>> captions, extras
(['红', '绿'], {})
"""

import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

# ---------------------------------------------------------------- randomness


def derive_seed(*parts) -> int:
    """A seed below 2³² that follows from `parts`, such as (seed, step).

    Similar parts give seeds of unrelated random numbers.
    """
    return random.Random(repr(parts)).getrandbits(32)


@contextlib.contextmanager
def fork_rng(seed: int) -> Iterator[None]:
    """Seed the global generators for the statements inside, and restore them afterwards.

    These are the generators of torch (the CPU's and, if CUDA is in use, the current GPU's), numpy
    and Python.
    """
    cuda = torch.cuda.is_initialized()
    torch_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if cuda else None
    numpy_state = np.random.get_state()
    python_state = random.getstate()

    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    if cuda:
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if cuda:
            torch.cuda.set_rng_state(cuda_state)


# ---------------------------------------------------------------- sampler, dataset, loader


class ResumableBatchSampler(torch.utils.data.Sampler):
    """Yields ((epoch, position), indices): which items make up the batches of one epoch.

    length: number of items in the dataset.
    batch_size: number of indices in a batch, in each process.
    seed: of the order.

    Each iteration yields one epoch and then moves on to the next. Set these attributes to resume,
    or to train in several processes; `infinite_batches` does so:

    epoch: the epoch of the next iteration.
    first: number of batches to leave out at the beginning of that epoch.
    rank, world_size: this process and the number of processes; each yields its part of the batches.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.first = 0
        self.rank = 0
        self.world_size = 1

    def __len__(self):
        return self.length // (self.batch_size * self.world_size) - self.first

    def __iter__(self):
        epoch = self.epoch
        batches = range(self.first, self.length // (self.batch_size * self.world_size))
        self.epoch += 1
        self.first = 0

        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        for k in batches:
            position = (k * self.world_size + self.rank) * self.batch_size
            yield (epoch, position), order[position:position + self.batch_size]


class BatchDataset(torch.utils.data.Dataset):
    """Reads a dataset one batch at a time, with the random numbers that belong to the batch.

    dataset: has `__len__` and `__getitem__`, or `__getitems__` for a whole batch.
    collate: makes a batch from a list of items; default: the dataset's own `collate`, if it has
        one, else torch's `default_collate`.
    seed: of what the dataset draws at random.
    """

    def __init__(self, dataset, collate=None, seed: int = 0):
        self.dataset = dataset
        self.collate = collate or getattr(dataset, "collate", default_collate)
        self.seed = seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]

    def __getitems__(self, key):
        """The collated batch for one value of `ResumableBatchSampler`."""
        epoch_and_position, indices = key
        with fork_rng(derive_seed(self.seed, epoch_and_position)):
            if hasattr(self.dataset, "__getitems__"):
                items = self.dataset.__getitems__(indices)
            else:
                items = [self.dataset[i] for i in indices]
            return self.collate(items)


def identity(batch):
    """The DataLoader's `collate_fn`: BatchDataset has collated the batch already."""
    return batch


def make_loader(
    dataset, batch_size: int, workers: int | None = None, collate=None, seed: int = 0
) -> DataLoader:
    """Batches of a dataset in random order, with a different order in each epoch.

    dataset: gives items; its class must be importable if CUDA and workers are used.
    batch_size: number of items in a batch. Items that do not fill a batch at the end of an epoch
        are left out of that epoch.
    workers: number of processes that read items. Default: 0 without CUDA, because the network needs
        all cores; up to 4 with CUDA.
    collate: makes a batch from a list of items, like DataLoader's `collate_fn`.
    seed: of the order and of what the dataset draws at random.

    Raises ValueError for a dataset with fewer items than one batch.
    """
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(
            f"{len(dataset)} items do not fill a batch of {batch_size}; "
            f"the batch size must be from 1 to {len(dataset)}"
        )
    cuda = torch.cuda.is_available()
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if cuda else 0
    return DataLoader(
        BatchDataset(dataset, collate, seed),
        batch_sampler=ResumableBatchSampler(len(dataset), batch_size, seed),
        num_workers=workers,
        collate_fn=identity,
        pin_memory=cuda,
        persistent_workers=workers > 0,
        generator=torch.Generator(),        # DataLoader then leaves the global one alone
        multiprocessing_context="spawn" if cuda and workers else None,
    )


# ---------------------------------------------------------------- batches for training


class Batch(NamedTuple):
    """What a loader gives for one training step.

    images: uint8 [B, C, H, W], or latents, float [B, Z, h, w].
    captions: a list of B captions: whatever the encoder takes, such as str, or int for labels.
    extras: more tensors by name, [B, ...] each.
    """

    images: torch.Tensor
    captions: list
    extras: dict[str, torch.Tensor]


def unpack_batch(batch) -> Batch:
    """Check a loader's batch and return it with its extras, if only an empty dict.

    batch: (images, captions) or (images, captions, extras), as described for `Batch`. Captions may
        also be a tuple, or a tensor, which becomes a list.

    Raises ValueError, saying what came, for anything else, and for float images in [0, 1].
    """
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else ()
    if len(parts) in (2, 3):
        images, captions, extras = (*parts, {})[:3]
        if isinstance(captions, torch.Tensor):
            captions = captions.tolist()
        if is_batch(images, captions, extras):
            check_pixels(images)
            return Batch(images, list(captions), extras)
    raise ValueError(
        "a batch must be (images [B, C, H, W], B captions) or (images, captions, extras) with a "
        f"dict of tensors [B, ...] as extras; the loader gave {describe(batch)}"
    )


def is_batch(images, captions, extras) -> bool:
    """Whether the parts of a batch have the types, and as many items, as described for `Batch`."""
    if not isinstance(captions, (tuple, list)) or not isinstance(extras, dict):
        return False
    tensors = [images, *extras.values()]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return False
    return all(tensor.shape[:1] == (len(captions),) for tensor in tensors)


def check_pixels(images: torch.Tensor) -> None:
    """Raise ValueError for float images in [0, 1], as torchvision's ToTensor makes them.

    They would be taken for latents, or for images in [-1, 1] that are all bright.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        return
    if images.device.type == "cpu" and images.min() >= 0 and 0 < images.max() <= 1:
        raise ValueError(
            "images must be uint8, 0 … 255, or floats in [-1, 1]; the loader gave "
            f"{images.dtype} from {float(images.min()):g} to {float(images.max()):g}: "
            "leave out ToTensor, use torchvision.transforms.PILToTensor"
        )


def describe(value) -> str:
    """The type of a value, the shape of a tensor, and those of the parts of a tuple or dict."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value):
        return f"({', '.join(describe(part) for part in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {describe(part)}' for name, part in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def normalize_pixels(values: torch.Tensor) -> torch.Tensor:
    """Map pixel values, uint8 0 … 255, to [-1, 1]; return any other tensor as it is."""
    return values.float() / 127.5 - 1 if values.dtype == torch.uint8 else values


def images_per_step(loader: Iterable, world_size: int = 1) -> int | None:
    """Number of images of a training step in all processes; None for a loader of another origin.

    loader: of `make_loader`, or another iterable of batches, whose batch size is not known.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, ResumableBatchSampler):
        return None
    return sampler.batch_size * world_size


def prepare_loader(accelerator, loader):
    """Divide the batches of a torch DataLoader among the processes of an Accelerator.

    A loader of `make_loader`, which does that by itself, and any other iterable is returned as it
    is.
    """
    is_resumable = isinstance(getattr(loader, "batch_sampler", None), ResumableBatchSampler)
    if isinstance(loader, DataLoader) and not is_resumable:
        return accelerator.prepare(loader)
    return loader


def infinite_batches(
    loader: Iterable, start: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator:
    """The batches of a loader, epoch after epoch.

    loader: of `make_loader`, or any other iterable of batches, for which the other arguments have
        no effect.
    start: the training step to begin with.
    rank, world_size: this process and the number of processes that share the batches.

    Raises ValueError if the loader yields no batch.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, ResumableBatchSampler):
        sampler.first = 0
        sampler.rank = rank
        sampler.world_size = world_size
        if len(sampler) == 0:
            raise ValueError(
                f"the loader yields no batch: {sampler.length} items do not fill "
                f"{world_size} batches of {sampler.batch_size}"
            )
        sampler.epoch, sampler.first = divmod(start, len(sampler))
    while True:
        is_empty = True
        for batch in loader:
            is_empty = False
            yield batch
        if is_empty:
            raise ValueError("the loader yields no batch: does the dataset fill one batch?")
