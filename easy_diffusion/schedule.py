"""How much noise there is at each timestep.

Diffusion destroys a picture in T small steps, each with a variance beta_t:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)

Many small Gaussian steps are one large Gaussian step, so any x_t comes straight from the picture x0:

    alpha_bar_t = (1 - beta_0) (1 - beta_1) ... (1 - beta_t)
    x_t = signal_t x0 + noise_t ε,    signal_t = sqrt(alpha_bar_t),    noise_t = sqrt(1 - alpha_bar_t)

(Ho et al., "Denoising Diffusion Probabilistic Models", 2020, eq. 2 and 4.) A schedule is nothing but the T betas;
everything here is float64, and t = 0 is the least noise. The file needs nothing but torch.

>>> schedule = NoiseSchedule.cosine(1000)
>>> len(schedule), round(float(schedule.signal[0]), 4)
(1000, 1.0)
"""

import math

import torch


class NoiseSchedule:
    """The betas of T timesteps and what follows from them, all float64 [T]: alphas_bar, signal, noise.

    Raises ValueError unless betas is one-dimensional, not empty and within (0, 1].
    """

    def __init__(self, betas):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas is a list of T numbers, not a tensor of shape {tuple(betas.shape)}")
        if not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"each beta lies in (0, 1]; these run from {betas.min():.4g} to {betas.max():.4g}")
        self.betas = betas
        self.alphas_bar = torch.cumprod(1 - betas, dim=0)
        self.signal = self.alphas_bar.sqrt()
        self.noise = (1 - self.alphas_bar).sqrt()

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> "NoiseSchedule":
        """Betas on a straight line (Ho et al. 2020, section 4)."""
        return cls(torch.linspace(first, last, steps, dtype=torch.float64))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, largest_beta: float = 0.999) -> "NoiseSchedule":
        """alpha_bar follows a squared cosine (Nichol & Dhariwal, "Improved DDPM", 2021, eq. 17)."""
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        alphas_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls((1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=largest_beta))

    def __len__(self) -> int:
        return len(self.betas)

    def alpha_bar(self, t: int) -> float:
        """alpha_bar at timestep t; 1.0 at t = -1, the clean picture, where every sampler ends."""
        return float(self.alphas_bar[t]) if t >= 0 else 1.0

    def signal_and_noise(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """signal_t and noise_t for timesteps t [B], each [B, 1, 1, ...], ready to multiply `like` [B, ...]."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        at = t.to("cpu", torch.int64)
        return tuple(values[at].to(like.device, like.dtype).view(shape) for values in (self.signal, self.noise))
