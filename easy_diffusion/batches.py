"""From a dataset to batches: in workers or without, once or for ever, and from any step on.

A worker is another process that reads pictures while the network learns. Where CUDA is in use it must be spawned, because a process that
was forked from one with CUDA cannot use it («Cannot re-initialize CUDA in forked subprocess»); its batches lie in pinned memory, from
which a GPU copies fastest. A spawned worker imports the program again: a script needs `if __name__ == "__main__":` around what it does, and
a dataset's class must stand in a file, not in a notebook's cell. Workers live as long as the loader: what they have opened stays open from
epoch to epoch. Pictures stay uint8 until they are on the device: a quarter of what floats take.

The order of epoch e follows from (seed, e) alone, so a run of one process that was broken off after step n goes on, with the same dataset
and batch size, with step n's batch, and no picture of the epoch is seen twice or missed. The file needs torch.

>>> numbers = torch.utils.data.TensorDataset(torch.arange(7))
>>> [len(batch) for batch, in batches(numbers, 2)]
[2, 2, 2]
>>> whole, later = endless(batches(numbers, 2)), endless(batches(numbers, 2), start=10)
>>> [next(whole)[0].tolist() for _ in range(11)][10] == next(later)[0].tolist()
True
"""

import os
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader


class Shuffled(torch.utils.data.Sampler):
    """Batches of indices below `length` in the order of epoch `epoch`, from batch `first` of it on; each iteration moves on to the next
    epoch."""

    def __init__(self, length: int, batch_size: int, seed: int = 0):
        self.length, self.batch_size, self.seed, self.epoch, self.first = length, batch_size, seed, 0, 0

    def __len__(self):
        return self.length // self.batch_size - self.first

    def __iter__(self):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        self.epoch, first, self.first = self.epoch + 1, self.first, 0
        for k in range(first, self.length // self.batch_size):
            yield order[k * self.batch_size:(k + 1) * self.batch_size]


def batches(dataset, batch_size: int, workers: int | None = None, collate=None, seed: int = 0) -> DataLoader:
    """Batches of a dataset in random order, another in each epoch; what does not fill a batch at an epoch's end is left out of it.

    workers: processes (default: none on a CPU, where the network needs all cores; four, or as many as there are cores, with CUDA).
    collate: items → batch, as DataLoader's collate_fn. Raises ValueError for a dataset of less than a batch.
    """
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(f"{len(dataset)} items do not fill a batch of {batch_size}")
    cuda = torch.cuda.is_available()
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if cuda else 0
    return DataLoader(dataset, batch_sampler=Shuffled(len(dataset), batch_size, seed), num_workers=workers, collate_fn=collate,
                      pin_memory=cuda, persistent_workers=workers > 0, multiprocessing_context="spawn" if cuda and workers else None)


def endless(loader: Iterable, start: int = 0) -> Iterator:
    """The loader's batches, epoch after epoch; of a loader by `batches` those from step `start` on. Raises ValueError if it gives none."""
    order = getattr(loader, "batch_sampler", None)
    if isinstance(order, Shuffled):
        order.first = 0
        order.epoch, order.first = divmod(start, len(order))
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("the loader gives no batch: are there fewer pictures than one batch holds?")
