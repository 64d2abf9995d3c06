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
>>> guard.check(0.5, 1.0, losses=[0.5] * 100), guard.check(float("nan"), 1.0, [])
('', 'the loss is nan')
>>> guard.check(9.0, 1.0, losses=[0.5] * 100)
'the loss is 9, after 0.5 on average over 100 steps'
>>> def step(pictures):
...     if pictures > 48: raise torch.OutOfMemoryError("out of memory")
>>> largest_batch(step)
32
"""

import copy
import math
from pathlib import Path

import torch

WINDOW = 100                                                                # losses that a spike is told from, and steps between two copies


class TrainingHealth:
    """Counts what is skipped and keeps the copy to go back to; `ill` from a skipped step to the next that is taken. average: the moving
    average's modules.

    patience: bad steps in a row before the copy comes back; rescues: how often it may; spike: k above, infinite for none."""

    def __init__(self, average: torch.nn.Module, patience: int = 5, max_rollbacks: int = 3, spike: float = 20.0):
        self.patience, self.max_rollbacks, self.spike = patience, max_rollbacks, spike
        self.skipped = self.in_a_row = self.rollbacks = self.snapshot_step = self.last_bad_step = 0
        self.unhealthy, self.reason, self.lr_scale, self.snapshot_loss, self.snapshot = False, "", 1.0, math.inf, copy.deepcopy(average.state_dict())

    def check(self, loss: float, norm: float, losses: list[float]) -> str:
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

    def step_taken(self, index: int, average: torch.nn.Module, losses: list[float]) -> None:
        """Step `index` was taken: nothing is wrong any more, and from time to time a copy is due."""
        self.in_a_row, self.unhealthy = 0, False
        if index - self.snapshot_step >= WINDOW and index - self.last_bad_step >= WINDOW:
            level = sum(losses[-WINDOW:]) / WINDOW
            if level < self.snapshot_loss + abs(self.snapshot_loss):
                self.snapshot_step, self.snapshot_loss, self.snapshot = index, level, copy.deepcopy(average.state_dict())
        if self.rollbacks and index - self.last_bad_step >= 10 * WINDOW:
            self.rollbacks = 0                                                # that was another trouble, long ago

    def step_skipped(self, reason: str, index: int) -> bool:
        """Step `index` was skipped; whether that was one too many in a row."""
        self.unhealthy, self.reason = True, self.reason if self.in_a_row else reason
        self.skipped, self.in_a_row, self.last_bad_step = self.skipped + 1, self.in_a_row + 1, index
        return self.in_a_row >= self.patience

    def roll_back(self, models, average, optimizers) -> str:
        """Back to the copy, at half the rate; the words for it, or "" if that has been tried often enough."""
        if self.rollbacks == self.max_rollbacks:
            return ""
        for modules in (models, average):
            modules.load_state_dict(self.snapshot)
        for optimizer in optimizers:
            optimizer.state.clear()
        self.lr_scale, self.rollbacks, self.in_a_row = self.lr_scale / 2, self.rollbacks + 1, 0
        return f"back to the average of step {self.snapshot_step}, at {self.lr_scale:g} of the learning rate"

    def describe(self) -> str:
        """Why a run is given up."""
        return (f"{self.reason}; {self.skipped} steps were skipped, {self.in_a_row} of them in a row, and {self.rollbacks} times the "
                "weights went back at a lower rate")

    def state_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("patience", "max_rollbacks", "spike")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def explain_failure(health, optimizers: list[tuple], checkpoint) -> str:
    """Why a run is given up, and what there is to do."""
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint is not None and Path(checkpoint).exists() else "there is no checkpoint"
    rates = " and ".join(f"{peak:g}" for _, peak in optimizers)
    return f"{health.describe()}; lower learning rates than {rates} may help; {kept}"
