"""Out of memory: recognize it, and find the largest batch that fits.

A batch that is too large for the memory can be split into micro-batches, whose gradients add up
(gradient accumulation); `train` in trainer.py does that when it runs out of memory. Or the batch
size can be chosen beforehand: `find_largest_batch` tries training steps with 1, 2, 4, … images.
The file needs torch and psutil.

>>> def step(images):
...     if images > 50:
...         raise torch.OutOfMemoryError("out of memory")
>>> catch_out_of_memory(step, 64) is None
True
>>> find_largest_batch(step), find_largest_batch(step, within=0)
(32, 50)
"""

import gc
import resource
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch

# The note of a training step that ran out of memory and was split begins with this.
OUT_OF_MEMORY = "out of memory"


def catch_out_of_memory(function: Callable, *arguments):
    """Return `function(*arguments)`, or None if it runs out of memory.

    In the second case the memory that it had taken is released. Other errors are raised.
    """
    phrases = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    try:
        return function(*arguments)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:           # what PyTorch raises on a CPU, and cuBLAS and cuDNN
        if not any(phrase in str(error) for phrase in phrases):
            raise
    # Only here, after the except clause, does the traceback no longer hold the tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def run_unsplit(steps: Iterable) -> None:
    """Run a training to its end; raise torch.OutOfMemoryError if a batch had to be split.

    steps: an iterator of `TrainingStep`, as `train` returns it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in steps:
            if step.note.startswith(OUT_OF_MEMORY):
                raise torch.OutOfMemoryError(step.note)


def free_memory() -> int:
    """Bytes of main memory that this process can still take, within its container's limit."""
    free = psutil.virtual_memory().available
    limit_file = Path("/sys/fs/cgroup/memory.max")
    if limit_file.exists():
        limit = limit_file.read_text().strip()
        if limit != "max":
            used = limit_file.with_name("memory.current").read_text()
            free = min(free, int(limit) - int(used))
    return free


def peak_memory() -> int:
    """The most main memory, in bytes, that this process has used so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak    # bytes on macOS, else KiB


def find_largest_batch(
    step: Callable[[int], object],
    max_batch: int = 1024,
    all_agree: Callable[[bool], bool] = bool,
    within: float = 1.0,
) -> int:
    """The largest batch for which a training step has enough memory.

    The batch size is doubled until a step fails. With within=1 the result is the largest power of
    two that fits. With a smaller value the interval between it and the first failure is halved
    until it is not longer than `within` times the result.

    A GPU reports that it is out of memory. A computer without a GPU begins to swap instead.
    Therefore a step is tried there only if it is expected to take less than half of the free
    memory. The expectation is proportional to the growth during the steps before.

    step: runs one training step with this number of images and raises an error if it does not
        fit; `run_unsplit` makes a training do so.
    max_batch: the largest batch size to try.
    all_agree: takes a flag of this process and returns whether it is true in all processes.
    within: relative precision of the result, from 0 (exact) to 1 (a power of two).

    Raises MemoryError if not even one image fits.
    """
    start = peak_memory()
    fits = 0                                # the largest batch that is known to fit
    too_large = max_batch + 1               # the smallest that is known or taken to be too large

    def try_step(images: int) -> bool:
        growth = (peak_memory() - start) * images / max(fits, 1)
        if not all_agree(torch.cuda.is_available() or growth < free_memory() / 2):
            return False
        # A list, because a step that succeeds may return None.
        result = catch_out_of_memory(lambda: [step(images)])
        return all_agree(result is not None)

    while fits == 0 or 2 * fits <= max_batch:
        images = max(1, 2 * fits)
        if not try_step(images):
            too_large = images
            break
        fits = images
    if fits == 0:
        raise MemoryError(
            "there is not enough memory for a step with one image: "
            "use a smaller network or smaller images"
        )
    while too_large - fits > max(1, within * fits):
        middle = (fits + too_large) // 2
        if try_step(middle):
            fits = middle
        else:
            too_large = middle
    return fits
