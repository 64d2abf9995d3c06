"""From a dataset to batches: in workers or without, once or for ever.

A worker is another process that reads pictures while the network learns. Where CUDA is in use it must be spawned, because a process that
was forked from one with CUDA cannot use it («Cannot re-initialize CUDA in forked subprocess»); its batches lie in pinned memory, from
which a GPU copies while it computes. Workers live as long as the loader: what they have opened stays open from epoch to epoch.
Pictures stay uint8 until they are on the device: a quarter of what floats take. The file needs torch.

>>> numbers = torch.utils.data.TensorDataset(torch.arange(7))
>>> [len(batch) for batch, in batches(numbers, 2)]
[2, 2, 2]
>>> again = endless(batches(numbers, 2))
>>> sum(len(next(again)[0]) for _ in range(10))
20
"""

import os
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader


def batches(dataset, batch_size: int, workers: int | None = None, collate=None) -> DataLoader:
    """Batches of a dataset in random order; those that do not fill a batch wait for another epoch.

    workers: processes (default: none on a CPU, where the network needs all cores; four, or as many as there are cores, with CUDA).
    collate: items → batch, as DataLoader's collate_fn. Raises ValueError for a dataset of less than a batch.
    """
    if len(dataset) < batch_size:
        raise ValueError(f"{len(dataset)} items do not fill a batch of {batch_size}")
    cuda = torch.cuda.is_available()
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if cuda else 0
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers, collate_fn=collate, pin_memory=cuda,
                      persistent_workers=workers > 0, multiprocessing_context="spawn" if cuda and workers else None)


def endless(loader: Iterable) -> Iterator:
    """The loader's batches, epoch after epoch. Raises ValueError if it gives none."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("the loader gives no batch: are there fewer pictures than one batch holds?")
