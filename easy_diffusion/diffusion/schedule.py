"""How much noise there is at each timestep.

Diffusion destroys a picture in T small steps, each with a variance beta_t:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)

Many small Gaussian steps are one large Gaussian step, so any x_t comes straight from the picture x0:

    alpha_bar_t = (1 - beta_0) (1 - beta_1) ... (1 - beta_t)
    x_t = signal_t x0 + noise_t ε,    signal_t = sqrt(alpha_bar_t),    noise_t = sqrt(1 - alpha_bar_t)

(Ho et al., "Denoising Diffusion Probabilistic Models", 2020, eq. 2 and 4.) A schedule is nothing but the T betas, and each
constructor below is one published way to choose them; everything is float64, and t = 0 is the least noise: our t is the papers' t - 1,
and x0 always the clean picture. The usual numbers of `linear`, `quad`, `sigmoid` and `const` are meant for about a thousand steps: with
a hundred they leave much of the picture at the end, from which no sampler knows how to start; take `cosine` or `jsd` there.

The usual schedules keep a little signal at the end, sqrt(alpha_bar_T) of 0.07 in Stable Diffusion's: a network that was
trained so has never seen pure noise, yet sampling starts from it, and the pictures' brightness suffers. `zero_terminal_snr`
mends a schedule (Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2023). The file needs nothing but torch.

>>> schedule = NoiseSchedule.cosine(1000)
>>> len(schedule), round(float(schedule.alpha_t[0]), 4)
(1000, 1.0)
"""

import math

import torch


class NoiseSchedule:
    """The betas of T timesteps and what follows from them, all float64 [T]: alpha_bar, signal, noise.

    Raises ValueError unless betas is one-dimensional, not empty and within (0, 1), the last within (0, 1].
    """

    def __init__(self, betas):
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas is a list of T numbers, not a tensor of shape {tuple(betas.shape)}")
        if not ((betas > 0) & (betas <= 1)).all() or (betas[:-1] == 1).any():
            raise ValueError(f"each beta lies in (0, 1), the last may be 1; these run from {betas.min():.4g} to {betas.max():.4g}")
        self.betas = betas
        self.alpha_bar = torch.cumprod(1 - betas, dim=0)
        self.alpha_t = self.alpha_bar.sqrt()
        self.sigma_t = (1 - self.alpha_bar).sqrt()

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> "NoiseSchedule":
        """Betas on a straight line (Ho et al. 2020, section 4)."""
        return cls(torch.linspace(first, last, steps, dtype=torch.float64))

    @classmethod
    def quad(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> "NoiseSchedule":
        """The betas' square roots on a straight line: slower at first than `linear`."""
        return cls(torch.linspace(first ** 0.5, last ** 0.5, steps, dtype=torch.float64) ** 2)

    @classmethod
    def scaled_linear(cls, steps: int = 1000) -> "NoiseSchedule":
        """Stable Diffusion's: `quad` from 0.00085 to 0.012 (Rombach et al., "Latent Diffusion", 2022)."""
        return cls.quad(steps, 0.00085, 0.012)

    @classmethod
    def const(cls, steps: int = 1000, beta: float = 0.02) -> "NoiseSchedule":
        """The same beta at every step, so that the signal decays like radioactivity."""
        return cls(torch.full((steps,), beta, dtype=torch.float64))

    @classmethod
    def jsd(cls, steps: int = 1000) -> "NoiseSchedule":
        """Betas 1/T, 1/(T-1) … 1, so that alpha_bar falls on a straight line to zero (J. Sohl-Dickstein et al., "Deep Unsupervised
        Learning using Nonequilibrium Thermodynamics", 2015, section 2.4.1, where it serves binomial data)."""
        return cls(1 / torch.arange(steps, 0, -1, dtype=torch.float64))

    @classmethod
    def sigmoid(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> "NoiseSchedule":
        """Betas along the S of a sigmoid from -6 to 6 (Xu et al., "GeoDiff", 2022)."""
        return cls(torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (last - first) + first)

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> "NoiseSchedule":
        """alpha_bar follows a squared cosine (Nichol & Dhariwal, "Improved DDPM", 2021, eq. 17)."""
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """The same schedule, its signal shifted and stretched so that the last timestep is pure noise (Lin et al. 2023,
        algorithm 1): signal ← (signal - last) · first / (first - last). Min-SNR, whose weight is 0 there, would never train it."""
        if len(self) < 2:
            raise ValueError("a schedule of one timestep has no last one to rescale")
        first, last = self.alpha_t[0], self.alpha_t[-1]
        alpha_bar = ((self.alpha_t - last) * first / (first - last)) ** 2
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return NoiseSchedule(1 - alpha_bar / before)

    def __len__(self) -> int:
        return len(self.betas)

    def alpha_bar_at(self, t: int) -> float:
        """alpha_bar at timestep t; 1.0 at t = -1, the clean picture, where every sampler ends."""
        return float(self.alpha_bar[t]) if t >= 0 else 1.0

    def alpha_sigma(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """signal_t and noise_t for timesteps t int64 [B], each [B, 1, 1, ...], ready to multiply `like` [B, ...]. ValueError for times
        that are no timesteps of this schedule."""
        shape, at = (-1,) + (1,) * (like.ndim - 1), t.cpu()
        if at.is_floating_point() or at.min() < 0 or at.max() >= len(self):
            raise ValueError(f"timesteps are whole numbers from 0 to {len(self) - 1}, not {at.dtype} from {at.min():.4g} to {at.max():.4g}")
        return tuple(values[at].to(like.device, like.dtype).view(shape) for values in (self.alpha_t, self.sigma_t))
