"""What goes wrong in a training that nobody watches, and what is done about it without waking anyone.

    a step whose loss or gradient is not finite,   is skipped and counted; the weights never see it
    or whose loss is a spike, beyond
        mean + k (deviation + |mean| / 10)         over the last 100 losses
    several of them in a row                       the weights become their moving average of some hundred steps ago, the optimizers
                                                   forget, and from here on the rates are halved
    that three times, and no end of it             the run stops, says why, and names its last checkpoint
    memory runs out                                the batch goes through the network in twice as many pieces, whose gradients add up

The moving average is what one goes back to because it is there anyway and lies in the middle of the good weights. A copy of it is taken
every hundred steps, unless there was something wrong on the way or the loss has doubled. The file needs torch and psutil.

>>> guard = Guard(torch.nn.ModuleDict({"network": torch.nn.Linear(1, 1)}))
>>> guard.wrong_with(0.5, 1.0, losses=[0.5] * 100), guard.wrong_with(float("nan"), 1.0, [])
('', 'the loss is nan')
>>> guard.wrong_with(9.0, 1.0, losses=[0.5] * 100)
'the loss is 9, after 0.5 on average over 100 steps'
>>> def step(pictures):
...     if pictures > 48: raise torch.OutOfMemoryError("out of memory")
>>> largest_batch(step)
32
"""

import copy
import gc
import math
import resource
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch

WINDOW = 100                                                                # losses that a spike is told from, and steps between two copies
NO_MEMORY = "memory ran out"                                                # how a step's note begins that had to be taken in more pieces


class Guard:
    """Counts what is skipped and keeps the copy to go back to; `ill` from a skipped step to the next that is taken. average: the moving
    average's modules.

    patience: bad steps in a row before the copy comes back; rescues: how often it may; spike: k above, infinite for none."""

    def __init__(self, average: torch.nn.Module, patience: int = 5, rescues: int = 3, spike: float = 20.0):
        self.patience, self.rescues, self.spike = patience, rescues, spike
        self.skipped = self.in_a_row = self.rescued = self.copied_at = self.last_bad = 0
        self.ill, self.trouble, self.lower, self.level, self.copy = False, "", 1.0, math.inf, copy.deepcopy(average.state_dict())

    def wrong_with(self, loss: float, norm: float, losses: list[float]) -> str:
        """What is wrong with a step, "" if nothing is. norm: the gradient's length before it is clipped; losses: of the steps taken."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the length of the gradient is {norm}"
        if len(losses) >= WINDOW and self.spike < math.inf:
            last = losses[-WINDOW:]
            mean = sum(last) / WINDOW
            deviation = (sum((value - mean) ** 2 for value in last) / WINDOW) ** 0.5
            if loss > mean + self.spike * (deviation + abs(mean) / 10):
                return f"the loss is {loss:.4g}, after {mean:.4g} on average over {WINDOW} steps"
        return ""

    def took(self, index: int, average: torch.nn.Module, losses: list[float]) -> None:
        """Step `index` was taken: nothing is wrong any more, and from time to time a copy is due."""
        self.in_a_row, self.ill = 0, False
        if index - self.copied_at >= WINDOW and index - self.last_bad >= WINDOW:
            level = sum(losses[-WINDOW:]) / WINDOW
            if level < self.level + abs(self.level):
                self.copied_at, self.level, self.copy = index, level, copy.deepcopy(average.state_dict())
        if self.rescued and index - self.last_bad >= 10 * WINDOW:
            self.rescued = 0                                                # that was another trouble, long ago

    def skips(self, trouble: str, index: int) -> bool:
        """Step `index` was skipped; whether that was one too many in a row."""
        self.ill, self.trouble = True, self.trouble if self.in_a_row else trouble
        self.skipped, self.in_a_row, self.last_bad = self.skipped + 1, self.in_a_row + 1, index
        return self.in_a_row >= self.patience

    def rescue(self, models, average, optimizers) -> str:
        """Back to the copy, at half the rate; the words for it, or "" if that has been tried often enough."""
        if self.rescued == self.rescues:
            return ""
        for modules in (models, average):
            modules.load_state_dict(self.copy)
        for optimizer in optimizers:
            optimizer.state.clear()
        self.lower, self.rescued, self.in_a_row = self.lower / 2, self.rescued + 1, 0
        return f"back to the average of step {self.copied_at}, at {self.lower:g} of the learning rate"

    def verdict(self) -> str:
        """Why a run is given up."""
        return (f"{self.trouble}; {self.skipped} steps were skipped, {self.in_a_row} of them in a row, and {self.rescued} times the "
                "weights went back at a lower rate")

    def state_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("patience", "rescues", "spike")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def unless_out_of_memory(work: Callable, *arguments):
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


def in_one_go(steps: Iterable) -> None:
    """Take these steps of a training. Raises torch.OutOfMemoryError where one had to be taken in more pieces than they began with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in steps:
            if step.note.startswith(NO_MEMORY):
                raise torch.OutOfMemoryError(step.note)


def free_memory() -> int:
    """Bytes that this process could still have: of the computer or, if that is less, of the container that it runs in."""
    free, limit = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(limit.with_name("memory.current").read_text()))
    return free


def largest_batch(step: Callable[[int], object], most: int = 1024, agreed: Callable[[bool], bool] = bool) -> int:
    """The largest power of two, at most `most`, for which `step`, a training step with so many pictures, has enough memory; of train's
    steps `in_one_go` tells whether it had.

    A GPU says no; a computer without one begins to swap, so there a step is only tried if, as the steps before have grown, it will take
    less than half of what is free. agreed: this process's answer → the answer of all. Raises MemoryError if not even one picture fits."""
    def peak():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most            # in bytes there, in KiB elsewhere

    fits, before = 0, peak()
    while fits < most:
        pictures = max(1, 2 * fits)
        if not agreed(torch.cuda.is_available() or 2 * (peak() - before) < free_memory() / 2):
            break
        if not agreed(unless_out_of_memory(lambda pictures=pictures: [step(pictures)]) is not None):
            break
        fits = pictures
    if not fits:
        raise MemoryError("there is not enough memory for a step with one picture: take a smaller network or smaller pictures")
    return fits
