"""From a dataset to batches: in workers or without, in one process or several, once or for ever, and from any step on.

A worker is another process that reads pictures while the network learns. Where CUDA is in use it must be spawned, because a process that
was forked from one with CUDA cannot use it («Cannot re-initialize CUDA in forked subprocess»); its batches lie in pinned memory, from
which a GPU copies fastest. A spawned worker imports the program again: a script needs `if __name__ == "__main__":` around what it does, and
a dataset's class must stand in a file, not in a notebook's cell. Workers live as long as the loader: what they have opened stays open from
epoch to epoch. Pictures stay uint8 until they are on the device: a quarter of what floats take.

The order of epoch e follows from (seed, e) alone, and what a dataset draws by chance for a batch from (seed, the batch's number): whoever
reads it, this process or a worker, begins torch's, numpy's and Python's generators there, and puts them back afterwards. So a run that was
broken off after step n goes on, with the same dataset and batch size, with step n's batch to the bit, and no picture of the epoch is seen
twice or missed. Where W processes train together, each takes its share of W batches: the k-th of them is what one process with a batch W
times as large would see. The file needs torch and numpy.

>>> numbers = torch.utils.data.TensorDataset(torch.arange(7))
>>> [len(batch) for batch, in batches(numbers, 2)]
[2, 2, 2]
>>> whole, later = endless(batches(numbers, 2)), endless(batches(numbers, 2), start=10)
>>> [next(whole)[0].tolist() for _ in range(11)][10] == next(later)[0].tolist()
True
>>> parts = [next(endless(batches(numbers, 2), rank=i, world_size=2))[0] for i in range(2)]
>>> next(endless(batches(numbers, 4)))[0].tolist() == torch.cat(parts).tolist()
True
"""

import contextlib
import os
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate


def derive_seed(*parts) -> int:
    """A number below 2^32 for these parts, to begin a generator at: near parts give numbers that have nothing in common."""
    return random.Random(repr(parts)).getrandbits(32)


@contextlib.contextmanager
def fork_rng(number: int) -> Iterator[None]:
    """Inside, the generators of torch (CPU and, if it is in use, CUDA), numpy and Python begin at `number`; then they are as before."""
    cuda = torch.cuda.is_initialized()
    before = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None, np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    if cuda:
        torch.cuda.manual_seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[2])
        random.setstate(before[3])
        if cuda:
            torch.cuda.set_rng_state(before[1])


class ResumableBatchSampler(torch.utils.data.Sampler):
    """(number, indices) of batches: indices below `length` in the order of epoch `epoch`, from batch `first` of it on; each iteration moves
    on to the next epoch. Of `processes` that train together number `process` gets its share, `batch_size` of each batch."""

    def __init__(self, length: int, batch_size: int, seed: int = 0):
        self.length, self.batch_size, self.seed, self.epoch, self.first = length, batch_size, seed, 0, 0
        self.rank, self.world_size = 0, 1

    def __len__(self):
        return self.length // (self.batch_size * self.world_size) - self.first

    def __iter__(self):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        epoch, first, self.epoch, self.first = self.epoch, self.first, self.epoch + 1, 0
        for k in range(first, self.length // (self.batch_size * self.world_size)):
            place = (k * self.world_size + self.rank) * self.batch_size
            yield (epoch, place), order[place:place + self.batch_size]


class BatchDataset(torch.utils.data.Dataset):
    """A dataset whose items are read a batch at a time, with the chance that belongs to the batch."""

    def __init__(self, dataset, collate=None, seed: int = 0):
        self.dataset, self.collate, self.seed = dataset, collate or default_collate, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]

    def __getitems__(self, numbered):
        number, indices = numbered
        with fork_rng(derive_seed(self.seed, number)):
            if hasattr(self.dataset, "__getitems__"):
                return self.collate(self.dataset.__getitems__(indices))
            return self.collate([self.dataset[i] for i in indices])


def identity(batch):
    """What Read has collated already."""
    return batch


def make_loader(dataset, batch_size: int, workers: int | None = None, collate=None, seed: int = 0) -> DataLoader:
    """Batches of a dataset in random order, another in each epoch; what does not fill a batch at an epoch's end is left out of it.

    workers: processes (default: none on a CPU, where the network needs all cores; four, or as many as there are cores, with CUDA).
    collate: items → batch, as DataLoader's collate_fn. Raises ValueError for a dataset of less than a batch.
    """
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(f"{len(dataset)} items do not fill a batch of {batch_size}; its size is from 1 to {len(dataset)}")
    cuda = torch.cuda.is_available()
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if cuda else 0
    return DataLoader(BatchDataset(dataset, collate, seed), batch_sampler=ResumableBatchSampler(len(dataset), batch_size, seed), num_workers=workers,
                      collate_fn=identity, pin_memory=cuda, persistent_workers=workers > 0, generator=torch.Generator(),
                      multiprocessing_context="spawn" if cuda and workers else None)


def images_per_step(loader: Iterable, world_size: int = 1) -> int | None:
    """How many pictures a step takes in all processes, of a loader by `batches`; None of any other."""
    order = getattr(loader, "batch_sampler", None)
    return order.batch_size * world_size if isinstance(order, ResumableBatchSampler) else None


def infinite_batches(loader: Iterable, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator:
    """The loader's batches, epoch after epoch; of a loader by `batches` those from step `start` on, and of them the share of number
    `process` of `processes`. Raises ValueError if it gives none."""
    order = getattr(loader, "batch_sampler", None)
    if isinstance(order, ResumableBatchSampler):
        order.first, order.rank, order.world_size = 0, rank, world_size
        if len(order) == 0:
            raise ValueError(f"the loader gives no batch: {order.length} items do not fill {world_size} batches of {order.batch_size}")
        order.epoch, order.first = divmod(start, len(order))
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("the loader gives no batch: are there fewer pictures than one batch holds?")
