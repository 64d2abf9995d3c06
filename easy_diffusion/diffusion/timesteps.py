"""How the timesteps of a training batch are drawn.

A training step computes the loss L_t of each image at one random timestep t. The distribution of
t decides which noise levels are trained most:

    uniform         p_t = 1 / T                      (Ho et al. 2020, algorithm 1)
    logit-normal    t = T sigmoid(z),  z ~ N(mean, std²)
                    favours medium noise levels      (Esser et al. 2024, section 3.1)
    importance      p_t ∝ sqrt(E[L_t²]),  loss = L_t / (T p_t)
                    favours large losses             (Nichol & Dhariwal 2021, eq. 18)

The first two change the objective: the expected loss weighs the timesteps by p_t. Importance
sampling divides by T p_t, so the expected loss is that of the uniform distribution and only its
variance is smaller.

Each function has the signature (batch, num_timesteps, generator) -> t [batch], on the generator's
device. `..._timesteps` return integers for a `GaussianDiffusion`; `..._time` return floats in
[0, 1] for models in continuous time, `RectifiedFlow` and `VarianceExploding`.

(Ho et al., "Denoising Diffusion Probabilistic Models", 2020; Nichol & Dhariwal, "Improved Denoising
Diffusion Probabilistic Models", 2021; Esser et al., "Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis", 2024.)

The file needs torch only.

>>> generator = torch.Generator().manual_seed(0)
>>> t = uniform_timesteps(4, 1000, generator)
>>> t.shape, t.dtype
(torch.Size([4]), torch.int64)
>>> t = logit_normal_time(4, 1000, generator)
>>> bool(((t > 0) & (t < 1)).all())
True
"""

import torch


def uniform_timesteps(
    batch: int, num_timesteps: int, generator: torch.Generator
) -> torch.Tensor:
    """Timesteps 0 … num_timesteps - 1 with equal probability, int64 [batch]."""
    return torch.randint(
        num_timesteps, (batch,), generator=generator, device=generator.device
    )


def logit_normal_timesteps(
    batch: int,
    num_timesteps: int,
    generator: torch.Generator,
    mean: float = 0.0,
    std: float = 1.2,
) -> torch.Tensor:
    """Timesteps t = floor(num_timesteps · sigmoid(z)), z ~ N(mean, std²), int64 [batch].

    mean: above 0 favours large t, below 0 small t.
    std: the smaller, the more t concentrates around num_timesteps · sigmoid(mean).

    (Esser et al. 2024, section 3.1.)
    """
    z = mean + std * torch.randn(batch, generator=generator, device=generator.device)
    return (torch.sigmoid(z) * num_timesteps).long().clamp(max=num_timesteps - 1)


def uniform_time(
    batch: int, num_timesteps: int, generator: torch.Generator, t_min: float = 1e-3
) -> torch.Tensor:
    """Times with a uniform distribution over [t_min, 1), float [batch].

    num_timesteps is not used: it is there for the common signature.
    """
    return t_min + (1 - t_min) * torch.rand(batch, generator=generator, device=generator.device)


def logit_normal_time(
    batch: int,
    num_timesteps: int,
    generator: torch.Generator,
    mean: float = 0.0,
    std: float = 1.0,
) -> torch.Tensor:
    """Times t = sigmoid(z), z ~ N(mean, std²), float [batch] in (0, 1).

    Medium times, where the velocity of a flow is hardest to predict, are drawn most often
    (Esser et al. 2024, section 3.1). num_timesteps is not used: it is there for the common
    signature.
    """
    z = torch.randn(batch, generator=generator, device=generator.device)
    return torch.sigmoid(mean + std * z)


class ImportanceTimesteps:
    """Importance sampling of timesteps: p_t ∝ sqrt(E[L_t²]).

    num_timesteps: T of the diffusion.
    history: how many of the last losses of each timestep estimate E[L_t²]. Until every timestep
        has this many, the distribution is uniform.

    It reduces the variance of a loss whose terms differ much in size, such as
    `GaussianDiffusion.vlb` (Nichol & Dhariwal 2021, eq. 18). In a training step:

        t = timesteps(batch, T, generator)
        losses = diffusion.vlb(network, x0, t)
        loss = timesteps.reweight(t, losses).mean()

    `train` calls `weights` and `update` instead, since it gathers the losses of all processes
    before it updates the estimate.
    """

    def __init__(self, num_timesteps: int, history: int = 10):
        self.history = history
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)      # [T, history]
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)                 # [T]

    def probabilities(self) -> torch.Tensor:
        """p_t, float64 [T]. Each is at least 0.001 / T, so every timestep can be drawn."""
        num_timesteps = len(self.losses)
        if (self.counts < self.history).any():
            return torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)
        root_mean_square = self.losses.square().mean(dim=1).sqrt()
        return 0.999 * root_mean_square / root_mean_square.sum() + 0.001 / num_timesteps

    def __call__(
        self, batch: int, num_timesteps: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Timesteps drawn from p_t, int64 [batch]. Raises ValueError for another T."""
        if num_timesteps != len(self.losses):
            raise ValueError(
                f"this sampler of timesteps is for T = {len(self.losses)}, not of {num_timesteps}"
            )
        # In float32, because Apple's GPU has no float64
        probabilities = self.probabilities().float().to(generator.device)
        return torch.multinomial(probabilities, batch, replacement=True, generator=generator)

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """The factors 1 / (T p_t) of the losses at timesteps t [B], float32 [B]."""
        return (1 / (len(self.losses) * self.probabilities())).float().to(t.device)[t]

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Add the unweighted losses [B] at timesteps t [B] to the history."""
        for timestep, loss in zip(t.tolist(), losses.detach().tolist()):
            self.losses[timestep, self.counts[timestep] % self.history] = loss
            self.counts[timestep] += 1

    def reweight(self, t: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """Return losses [B] at timesteps t [B], each divided by T p_t, and update the history."""
        weights = self.weights(t)
        self.update(t, losses)
        return losses * weights.to(losses)

    def state_dict(self) -> dict:
        """The history of the losses, for a checkpoint."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        """Restore the history of the losses from a checkpoint."""
        self.losses = state["losses"]
        self.counts = state["counts"]
