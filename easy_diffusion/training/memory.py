"""Out of memory: recognize it, and find the largest batch that fits.

A batch that is too large for the memory can be split into micro-batches, whose gradients add up
(gradient accumulation); `train` in trainer.py does that when it runs out of memory, with
`MicroBatches`. Or the batch size can be chosen beforehand: `find_largest_batch` tries training
steps with 1, 2, 4, … images.
The file needs torch and psutil.

>>> def step(images):
...     if images > 50:
...         raise torch.OutOfMemoryError("out of memory")
>>> catch_out_of_memory(step, 64) is None
True
>>> find_largest_batch(step), find_largest_batch(step, within=0)
(32, 50)
>>> MicroBatches(2).slices(batch_size=5)
[slice(0, 3, None), slice(3, 6, None)]
"""

import gc
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch

try:
    import resource
except ImportError:                         # on Windows
    resource = None

# The note of a training step that ran out of memory and was split begins with this: of the notes
# of a step, which "; " joins, it is the first.
OUT_OF_MEMORY = "out of memory"


def catch_out_of_memory(function: Callable, *arguments):
    """Return `function(*arguments)`, or None if it runs out of memory.

    In the second case the memory that it had taken is released. Other errors are raised.
    """
    # On Linux and macOS; on Windows; of cuBLAS and cuDNN
    phrases = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    try:
        return function(*arguments)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:           # what PyTorch raises on a CPU
        if not any(phrase in str(error) for phrase in phrases):
            raise
    # Only here, after the except clause, does the traceback no longer hold the tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


class MicroBatches:
    """Number of micro-batches into which each batch is split; it doubles once.

    count: the number to begin with.
    doubled: whether the memory has run out and the number was doubled.
    """

    def __init__(self, count: int = 1):
        self.count = count
        self.doubled = False

    def slices(self, batch_size: int) -> list[slice]:
        """Return the slices of a batch, all of the same size but the last."""
        size = math.ceil(batch_size / self.count)
        return [slice(start, start + size) for start in range(0, batch_size, size)]

    def double(self, index: int, batch_size: int) -> str:
        """Split batches in twice as many parts from step `index` on; return a note for the log.

        Raises torch.OutOfMemoryError the second time.
        """
        if self.doubled:
            raise torch.OutOfMemoryError(
                f"{OUT_OF_MEMORY} at step {index} with {self.count} micro-batches, too: "
                "use a smaller batch"
            )
        self.count *= 2
        self.doubled = True
        return (
            f"{OUT_OF_MEMORY} at step {index}; from now on each batch of {batch_size} images "
            f"is split into {self.count} micro-batches, whose gradients add up"
        )

    def state_dict(self) -> dict:
        return {"micro_batches": self.count, "micro_batches_doubled": self.doubled}

    def load_state_dict(self, state: dict) -> None:
        """Load from a dict with these keys, which may have others, too."""
        if state["micro_batches_doubled"]:
            # If the caller asks for more micro-batches than were saved, they may double once more.
            self.doubled = self.count <= state["micro_batches"]
            self.count = max(self.count, state["micro_batches"])


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
    if resource is None:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)         # only Windows has the first
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
        if torch.cuda.is_available():
            gc.collect()    # a Trainer is in a reference cycle; it would keep its tensors
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
