"""TODO."""

import gc
import resource
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch

OUT_OF_MEMORY = "memory ran out"                                                # how a step's note begins that had to be taken in more pieces


def catch_out_of_memory(work: Callable, *arguments):
    """What `work` gives; None, with everything that it held given back, if memory ran out."""
    try:
        return work(*arguments)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = any(words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not said:
            raise
    gc.collect()                                                            # here, where the traceback no longer holds the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def run_unsplit(steps: Iterable) -> None:
    """Take these steps of a training. Raises torch.OutOfMemoryError where one had to be taken in more pieces than they began with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in steps:
            if step.note.startswith(OUT_OF_MEMORY):
                raise torch.OutOfMemoryError(step.note)


def free_memory() -> int:
    """Bytes that this process could still have: of the computer or, if that is less, of the container that it runs in."""
    free, limit = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(limit.with_name("memory.current").read_text()))
    return free


def find_largest_batch(step: Callable[[int], object], max_batch: int = 1024, all_agree: Callable[[bool], bool] = bool) -> int:
    """The largest power of two, at most `most`, for which `step`, a training step with so many pictures, has enough memory; of train's
    steps `in_one_go` tells whether it had.

    A GPU says no; a computer without one begins to swap, so there a step is only tried if, as the steps before have grown, it will take
    less than half of what is free. all_agree: this process's answer → the answer of all. Raises MemoryError if not even one picture fits."""
    def peak():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most            # in bytes there, in KiB elsewhere

    fits, before = 0, peak()
    while fits < max_batch:
        pictures = max(1, 2 * fits)
        if not all_agree(torch.cuda.is_available() or 2 * (peak() - before) < free_memory() / 2):
            break
        if not all_agree(catch_out_of_memory(lambda pictures=pictures: [step(pictures)]) is not None):
            break
        fits = pictures
    if not fits:
        raise MemoryError("there is not enough memory for a step with one picture: take a smaller network or smaller pictures")
    return fits
