"""What `train` yields for each step.

The file needs torch.

>>> TrainingStep._fields[:4]
('index', 'loss', 'smooth_loss', 'learning_rate')
"""

import math
from typing import NamedTuple

import torch


class TrainingStep(NamedTuple):
    """One training step, as `train` yields it.

    index: number of the step, from 0.
    loss: mean over the batch, in all processes.
    smooth_loss: exponential moving average of the losses of the steps taken.
    learning_rate: of AdamW, or of SGD in the phase "sgd".
    phase: "adamw" or "sgd".
    images_per_second: in all processes, since the run started or resumed.
    seconds: training time so far, without the caller's time.
    progress: from 0 to 1; 0 if neither steps nor minutes are limited.
    ema_network, ema_encoder: the network and the encoder with the EMA weights, in eval mode;
        ema_encoder is None if no encoder is trained.
    quartiles: the smoothed loss of the timesteps in each quarter of the noise schedule, the least
        noise first; nan: no timestep drawn yet. See loss_history.py.
    gradient_norm: before clipping.
    skipped: number of skipped steps so far.
    note: what a log should record about the step, joined by "; "; "" for most steps.
    """

    index: int
    loss: float
    smooth_loss: float
    learning_rate: float
    phase: str
    images_per_second: float
    seconds: float
    progress: float
    ema_network: torch.nn.Module
    ema_encoder: torch.nn.Module | None
    quartiles: tuple[float, float, float, float]
    gradient_norm: float = math.nan
    skipped: int = 0
    note: str = ""
