"""The random numbers of a training step: timesteps, dropped captions, noise, dropout.

All of them follow from (seed, i) for step i, whatever other code draws in between. That is why a
run that was killed and resumed ends with the weights of an unbroken run.

Timesteps and dropped captions are drawn on the CPU, where the captions are dropped; the noise is
drawn on the device. On a CPU, one generator draws all of them, for the batches of all W processes,
and each process takes its part: W processes train on what one process draws for a batch W times as
large. On a GPU the noise of each process has a seed of its own.

The file needs torch and, beside it, data_loader.py; its example also the folder diffusion/.

>>> from ..diffusion.timesteps import uniform_timesteps
>>> draws = StepDraws(uniform_timesteps, 1000, caption_dropout=0.5, seed=0)
>>> batch = Batch(torch.zeros(4, 3, 8, 8), ["红", "绿", "蓝", "白"], {})
>>> t, captions = draws.start_step(0, batch)
>>> t.shape, captions.count("")
(torch.Size([4]), 2)
>>> torch.equal(draws.start_step(0, batch)[0], t)
True
"""

import torch

from .data_loader import Batch, derive_seed, fork_rng


class StepDraws:
    """Draws the random numbers of this process's part of each step.

    timesteps: function (batch, T, generator) → t [batch].
    num_timesteps: T.
    caption_dropout: fraction of the captions that become uncond.
    seed: of timesteps, dropped captions, noise and dropout.
    uncond: the caption that replaces the dropped ones.
    device: where the noise is drawn.
    rank, world_size: this process and the number of processes.

    The attribute `noise_generator` gives the noise of a step after `start_step`.
    """

    def __init__(
        self, timesteps, num_timesteps: int, caption_dropout: float, seed: int,
        uncond="", device="cpu", rank: int = 0, world_size: int = 1,
    ):
        self.timesteps = timesteps
        self.num_timesteps = num_timesteps
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.uncond = uncond
        self.rank = rank
        self.world_size = world_size
        self.generator = torch.Generator()                  # of timesteps and dropped captions
        on_cpu = torch.device(device).type == "cpu"
        self.noise_generator = self.generator if on_cpu else torch.Generator(device)

    def start_step(self, index: int, batch: Batch) -> tuple[torch.Tensor, list]:
        """Return the timesteps [B], on the CPU, and the captions, some of them dropped.

        index: of the step. `noise_generator` is left where this process's noise begins.
        """
        generator = self.generator
        count = len(batch.images)
        total = self.world_size * count
        own_part = slice(self.rank * count, (self.rank + 1) * count)
        generator.manual_seed(derive_seed(self.seed, index))
        # A function that draws from the global generators instead gets a seed of its own, so that
        # its timesteps do not depend on `dropped`.
        with fork_rng(derive_seed(self.seed, index, "timesteps")):
            t = self.timesteps(total, self.num_timesteps, generator)[own_part]
        dropped = torch.rand(total, generator=generator)[own_part]
        dropped = (dropped < self.caption_dropout).tolist()
        captions = [self.uncond if drop else c for c, drop in zip(batch.captions, dropped)]
        self.move_to_own_noise(index, batch.images.shape)
        return t, captions

    def move_to_own_noise(self, index: int, shape) -> None:
        """Move `noise_generator` to this process's noise; shape: [B, C, H, W] of its batch."""
        if self.noise_generator is self.generator:
            # Draw the noise of the processes before and drop it: only the position matters.
            torch.randn(self.rank * shape[0], *shape[1:], generator=self.generator)
        else:
            # On a GPU the numbers depend on the size of the draw: a seed of its own is simpler.
            self.noise_generator.manual_seed(derive_seed(self.seed, index, "noise", self.rank))

    def dropout_rng(self, index: int):
        """Context manager for the network's forward pass, whose dropout uses global generators.

        Its seed is not that of the noise, so that the masks do not depend on it.
        """
        return fork_rng(derive_seed(self.seed, index, self.rank, "dropout"))
