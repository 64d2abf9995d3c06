"""The losses of a training: all, smoothed, of each quarter of the noise schedule, the lowest.

A single loss depends on the timesteps that were drawn for the batch. The log shows smoothed losses:

    smooth_loss  ←  0.98 smooth_loss + 0.02 loss

The mean loss of a run may look constant while the loss of the timesteps with the most noise still
falls (Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, section 3.3).
Therefore each quarter of the noise schedule has a smoothed loss of its own. The file needs torch.

>>> history = LossHistory()
>>> history.update(0.5, torch.tensor([0.4, 0.6]), torch.tensor([0, 99]), num_timesteps=100)
>>> history.losses, history.smooth_loss
([0.5], 0.5)
>>> [round(loss, 1) for loss in history.quartile_losses]        # no timestep in quarters 2 and 3
[0.4, nan, nan, 0.6]
"""

import math
import statistics

import torch


def update_quartile_losses(
    smoothed: tuple[float, ...], losses: torch.Tensor, t: torch.Tensor, num_timesteps: int
) -> tuple[float, ...]:
    """Update the smoothed loss of each quarter of the noise schedule.

    smoothed: the four values before this step; nan for a quarter without losses so far.
    losses: of each image, [B].
    t: the images' timesteps, [B]: int64 below num_timesteps, or float in [0, 1].

    Each value moves by 1/50 towards the mean of the new losses in its quarter.
    """
    fractions = t if t.is_floating_point() else t / num_timesteps
    quarters = [min(int(4 * fraction), 3) for fraction in fractions.tolist()]
    losses = losses.tolist()
    updated = []
    for quarter, value in enumerate(smoothed):
        new = [loss for loss, q in zip(losses, quarters) if q == quarter]
        mean = statistics.fmean(new) if new else value
        updated.append(mean if math.isnan(value) else value + (mean - value) / 50)
    return tuple(updated)


class LossHistory:
    """The losses of the steps that were taken. All attributes are stored in checkpoints.

    losses: of all steps, oldest first.
    smooth_loss: their exponential moving average; nan before the first step.
    quartile_losses: the smoothed loss of each quarter of the noise schedule, the least noise first.
    lowest_loss: the lowest mean of a window of losses among the checkpoints so far.
    """

    def __init__(self):
        self.losses = []
        self.smooth_loss = math.nan
        self.quartile_losses = (math.nan,) * 4
        self.lowest_loss = math.inf

    def update(
        self, loss: float, image_losses: torch.Tensor, t: torch.Tensor, num_timesteps: int
    ) -> None:
        """Add a step.

        loss: of the batch, in all processes.
        image_losses, t: loss and timestep of each image in this process, [B].
        num_timesteps: the length T of the noise schedule.
        """
        self.losses.append(loss)
        if math.isnan(self.smooth_loss):
            self.smooth_loss = loss
        else:
            self.smooth_loss = 0.98 * self.smooth_loss + 0.02 * loss
        self.quartile_losses = update_quartile_losses(
            self.quartile_losses, image_losses, t, num_timesteps
        )

    def window_mean(self, window: int) -> float:
        """Return the mean of the last `window` losses; infinite without losses."""
        return statistics.fmean(self.losses[-window:]) if self.losses else math.inf

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Load from a dict with these keys, which may have others, too."""
        self.losses = state["losses"]
        self.smooth_loss = state["smooth_loss"]
        self.quartile_losses = tuple(state["quartile_losses"])
        self.lowest_loss = state["lowest_loss"]
