"""Training health: skip bad steps, roll back after several in a row, and give up if that fails.

A step is bad if its loss or its gradient norm is not finite, or if its loss is a spike:

    loss > mean + k (std + |mean| / 10)     mean and std of the last 100 losses, k = `spike`

    one bad step                  It is skipped: weights and optimizers stay as they are.
    `patience` bad steps in       Roll back: the weights become the EMA weights of a snapshot, the
    a row                         optimizers are reset, and the learning rates are halved.
    the same after                Training stops with an error that gives the reason and names
    `max_rollbacks` roll-backs    the last checkpoint.

A snapshot is a copy of the EMA weights. Training keeps these anyway, and as an average over many
steps they are little affected by a single one. A snapshot is taken every 100 steps, but not within
100 steps after a bad step, and not if the mean loss has doubled since the last snapshot. The file
needs nothing but torch.

>>> health = TrainingHealth(torch.nn.ModuleDict({"network": torch.nn.Linear(1, 1)}))
>>> health.check(0.5, norm=1.0, losses=[0.5] * 100)
''
>>> health.check(float("nan"), norm=1.0, losses=[])
'the loss is nan'
>>> health.check(9.0, norm=1.0, losses=[0.5] * 100)
'the loss is 9, a spike: the mean of the last 100 losses is 0.5'
"""

import copy
import math
from pathlib import Path

import torch

# Number of losses that a spike is compared with, and of steps between two snapshots.
WINDOW = 100


class TrainingHealth:
    """Judges each step, counts the skipped ones, and keeps the snapshot to roll back to.

    ema_models: the modules with the EMA weights.
    patience: number of bad steps in a row that triggers a roll-back.
    max_rollbacks: number of roll-backs before training is given up.
    spike: the factor k at the top of the file; infinite: no loss is a spike.

    While `unhealthy` is True, from a skipped step to the next one that is taken, no checkpoint
    should be written. `lr_scale` multiplies the learning rates.
    """

    def __init__(
        self,
        ema_models: torch.nn.Module,
        patience: int = 5,
        max_rollbacks: int = 3,
        spike: float = 20.0,
    ):
        self.patience = patience
        self.max_rollbacks = max_rollbacks
        self.spike = spike
        # All attributes below are stored in checkpoints under their names.
        self.skipped = 0                    # number of skipped steps
        self.in_a_row = 0                   # number of skipped steps since the last one taken
        self.last_bad_step = 0
        self.unhealthy = False
        self.reason = ""                    # why the first step of the row was skipped
        self.rollbacks = 0
        self.lr_scale = 1.0
        self.snapshot = copy.deepcopy(ema_models.state_dict())
        self.snapshot_step = 0
        self.snapshot_loss = math.inf       # mean of the 100 losses before the snapshot

    def check(self, loss: float, norm: float, losses: list[float]) -> str:
        """Why a step is bad; "" for a good step.

        loss: the step's loss.
        norm: the norm of its gradient, before clipping.
        losses: the losses of all steps taken before.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if len(losses) >= WINDOW and self.spike < math.inf:
            recent = losses[-WINDOW:]
            mean = sum(recent) / WINDOW
            std = (sum((value - mean) ** 2 for value in recent) / WINDOW) ** 0.5
            if loss > mean + self.spike * (std + abs(mean) / 10):
                return (
                    f"the loss is {loss:.4g}, a spike: "
                    f"the mean of the last {WINDOW} losses is {mean:.4g}"
                )
        return ""

    def step_taken(self, index: int, ema_models: torch.nn.Module, losses: list[float]) -> None:
        """Record that step `index` was taken; take a snapshot if one is due.

        losses: the losses of all steps taken, this one included.
        """
        self.in_a_row = 0
        self.unhealthy = False
        steps_since_bad = index - self.last_bad_step
        if index - self.snapshot_step >= WINDOW and steps_since_bad >= WINDOW:
            loss = sum(losses[-WINDOW:]) / WINDOW
            if loss < self.snapshot_loss + abs(self.snapshot_loss):     # it has not doubled
                self.snapshot_step = index
                self.snapshot_loss = loss
                self.snapshot = copy.deepcopy(ema_models.state_dict())
        if self.rollbacks and steps_since_bad >= 10 * WINDOW:
            self.rollbacks = 0              # the next bad steps have another cause

    def step_skipped(self, reason: str, index: int) -> bool:
        """Record that step `index` was skipped; return whether it is time to roll back."""
        if self.in_a_row == 0:
            self.reason = reason
        self.unhealthy = True
        self.skipped += 1
        self.in_a_row += 1
        self.last_bad_step = index
        return self.in_a_row >= self.patience

    def roll_back(self, models, ema_models, optimizers) -> str:
        """Load the snapshot into both modules, reset the optimizers and halve the learning rates.

        Returns a sentence for the log, or "" if all roll-backs are used up; then nothing changes.
        """
        if self.rollbacks == self.max_rollbacks:
            return ""
        for module in (models, ema_models):
            module.load_state_dict(self.snapshot)
        for optimizer in optimizers:
            optimizer.state.clear()
        self.lr_scale /= 2
        self.rollbacks += 1
        self.in_a_row = 0
        return (
            f"{self.patience} bad steps in a row: rolled back to the EMA weights of step "
            f"{self.snapshot_step}; learning rate × {self.lr_scale:g}"
        )

    def describe(self) -> str:
        """The reason for the bad steps and how many there were."""
        return (
            f"{self.reason}; {self.skipped} steps were skipped, {self.in_a_row} of them in a row "
            f"after {self.rollbacks} roll-backs"
        )

    def state_dict(self) -> dict:
        options = ("patience", "max_rollbacks", "spike")
        return {name: value for name, value in vars(self).items() if name not in options}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def explain_failure(health: TrainingHealth, optimizers: list[tuple], checkpoint) -> str:
    """The message with which a training is given up: the reason, and what may help.

    optimizers: pairs (optimizer, peak learning rate).
    checkpoint: the path of the training's checkpoint, or None.
    """
    learning_rates = " and ".join(f"{peak:g}" for _, peak in optimizers)
    saved = "there is no checkpoint"
    if checkpoint is not None and Path(checkpoint).exists():
        saved = f"the last good checkpoint is {checkpoint}"
    return (
        f"{health.describe()}; lower learning rates than {learning_rates} may help; {saved}"
    )
