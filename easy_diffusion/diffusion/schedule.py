"""Noise schedules: how much of the image and how much noise x_t contains at each timestep.

The forward process adds Gaussian noise to an image in T small steps, with variances beta_t:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)

A sequence of Gaussian steps is again Gaussian, so x_t can be computed from the clean image x0
in one step:

    alpha_bar_t = (1 - beta_0) (1 - beta_1) … (1 - beta_t)
    x_t = alpha_t x0 + sigma_t eps,    eps ~ N(0, I)
    alpha_t = sqrt(alpha_bar_t),    sigma_t = sqrt(1 - alpha_bar_t)

(Ho et al., "Denoising Diffusion Probabilistic Models", 2020, eq. 2 and 4.)

Notation:
- Timesteps run from t = 0, the least noise, to t = T - 1. Our t is Ho et al.'s t - 1.
- x0 is the clean image, without noise. Samplers end at x0 and call it t = -1. x0 is not x_t at
  t = 0: that already contains a little noise.
- alpha_t is the factor of x0, as in DPM-Solver. Ho et al. write alpha_t for 1 - beta_t.
- The bar of alpha_bar means a product. That of x̄ and σ̄ in samplers.py means divided by alpha_t.
- Each of these values depends on t. The attributes `alpha_bar`, `alpha_t` and `sigma_t` of a
  schedule are arrays that hold the values of all T timesteps.
- sigma has three meanings in papers: our sigma_t; sigma_t / alpha_t, in Karras et al. (our σ̄);
  and the standard deviation of the noise that a step adds, in DDPM and DDIM (our std).
- SNR_t = alpha_t² / sigma_t² is the signal-to-noise ratio.

A schedule is defined by its T betas. Each constructor below is one published choice. All values
are float64.

The defaults of `linear`, `quad`, `sigmoid` and `const` are made for T of about 1000. With T = 100
they end far from pure noise: alpha_bar of the last timestep is 0.36 for `linear`. Sampling, which
starts from pure noise, then fails. For a small T use `cosine`, or `jsd`, in which alpha_bar
decreases linearly to zero (the initials of J. Sohl-Dickstein, its author). `jsd` ends at SNR 0:
train with "v" or "x0".

Even with T = 1000 most schedules end at an SNR above zero; in Stable Diffusion's schedule the
last alpha_t is 0.07. A network trained with it never sees pure noise, although sampling starts
from it, and this limits the brightness of the samples. `zero_terminal_snr` rescales a schedule to
a last SNR of zero (Lin et al., "Common diffusion noise schedules and sample steps are flawed",
2023).

The file needs torch only.

>>> schedule = NoiseSchedule.cosine(1000)
>>> len(schedule), schedule.alpha_bar.shape, round(schedule.alpha_bar_at(500), 2)
(1000, torch.Size([1000]), 0.49)
>>> alpha_t, sigma_t = schedule.alpha_sigma(torch.tensor([0, 999]), torch.zeros(2, 3, 8, 8))
>>> alpha_t.shape
torch.Size([2, 1, 1, 1])
"""

import math

import torch


class NoiseSchedule:
    """The betas of T timesteps and the values computed from them.

    betas: T values in (0, 1); the last one may be 1.

    Attributes, each float64 [T] on the CPU: betas, alpha_bar, alpha_t, sigma_t.

    Raises ValueError for betas that are empty, not one-dimensional or out of range.
    """

    def __init__(self, betas):
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a list of T values, not of shape {tuple(betas.shape)}")
        in_range = ((betas > 0) & (betas <= 1)).all()
        beta_is_one_before_last = (betas[:-1] == 1).any()
        if not in_range or beta_is_one_before_last:
            raise ValueError(
                "each beta must be in (0, 1), and only the last may be 1; "
                f"these range from {betas.min():.4g} to {betas.max():.4g}"
            )
        self.betas = betas
        self.alpha_bar = torch.cumprod(1 - betas, dim=0)
        self.alpha_t = self.alpha_bar.sqrt()
        self.sigma_t = (1 - self.alpha_bar).sqrt()
        self._alpha_table = TimestepTable(self.alpha_t)
        self._sigma_table = TimestepTable(self.sigma_t)

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> "NoiseSchedule":
        """Betas that increase linearly from beta_start to beta_end (Ho et al. 2020, section 4)."""
        return cls(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))

    @classmethod
    def quad(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> "NoiseSchedule":
        """Betas whose square roots increase linearly.

        They increase more slowly at first than those of `linear`.
        """
        start, end = beta_start ** 0.5, beta_end ** 0.5
        return cls(torch.linspace(start, end, num_timesteps, dtype=torch.float64) ** 2)

    @classmethod
    def scaled_linear(cls, num_timesteps: int = 1000) -> "NoiseSchedule":
        """Stable Diffusion's schedule: `quad` from 0.00085 to 0.012.

        (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022.)
        """
        return cls.quad(num_timesteps, beta_start=0.00085, beta_end=0.012)

    @classmethod
    def const(cls, num_timesteps: int = 1000, beta: float = 0.02) -> "NoiseSchedule":
        """The same beta at every timestep: alpha_bar decays exponentially."""
        return cls(torch.full((num_timesteps,), beta, dtype=torch.float64))

    @classmethod
    def jsd(cls, num_timesteps: int = 1000) -> "NoiseSchedule":
        """Betas 1/T, 1/(T - 1), …, 1: alpha_bar decreases linearly to zero.

        (J. Sohl-Dickstein et al., "Deep Unsupervised Learning using Nonequilibrium
        Thermodynamics", 2015, section 2.4.1, where it is used for binomial data.)

        It ends at SNR 0: train with prediction type "v" or "x0", see `zero_terminal_snr`.
        """
        return cls(1 / torch.arange(num_timesteps, 0, -1, dtype=torch.float64))

    @classmethod
    def sigmoid(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> "NoiseSchedule":
        """Betas between beta_start and beta_end that follow a sigmoid over [-6, 6].

        (Xu et al., "GeoDiff", 2022.)
        """
        u = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64)
        return cls(torch.sigmoid(u) * (beta_end - beta_start) + beta_start)

    @classmethod
    def cosine(
        cls, num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
    ) -> "NoiseSchedule":
        """Betas for which alpha_bar follows a squared cosine.

        offset: keeps the first betas from becoming too small; `s` in the paper.
        max_beta: upper limit of the betas, which would otherwise reach 1.

        (Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, eq. 17.)
        """
        u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """A rescaled copy of the schedule whose last timestep is pure noise.

        alpha_t ← (alpha_t - alpha_{T-1}) alpha_0 / (alpha_0 - alpha_{T-1})

        The first alpha_t stays as it is and the last one becomes zero (Lin et al. 2023,
        algorithm 1).

        Train with prediction type "v" or "x0": at the last timestep x0 cannot be computed from
        eps. Do not use the min-SNR weight: there it is 0 for "v" and "x0", so that the last
        timestep would not be trained.

        Raises ValueError for a schedule of one timestep.
        """
        if len(self) < 2:
            raise ValueError("a schedule of one timestep cannot be rescaled to zero terminal SNR")
        first, last = self.alpha_t[0], self.alpha_t[-1]
        alpha_bar = ((self.alpha_t - last) * first / (first - last)) ** 2
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return NoiseSchedule(1 - alpha_bar / alpha_bar_prev)

    def __len__(self) -> int:
        """The number of timesteps T."""
        return len(self.betas)

    def alpha_bar_at(self, t: int) -> float:
        """alpha_bar at timestep t; 1.0 at t = -1, the clean image, where samplers end."""
        return float(self.alpha_bar[t]) if t >= 0 else 1.0

    def alpha_at(self, t: int) -> float:
        """alpha_t at timestep t; 1.0 at t = -1, where the element alpha_t[-1] would be wrong."""
        return float(self.alpha_t[t]) if t >= 0 else 1.0

    def sigma_at(self, t: int) -> float:
        """sigma_t at timestep t; 0.0 at t = -1, where the element sigma_t[-1] would be wrong."""
        return float(self.sigma_t[t]) if t >= 0 else 0.0

    def alpha_sigma(self, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t at the timesteps of a batch, in a shape that multiplies x.

        t: int64 [B], from 0 to T - 1.
        x: [B, ...], for example images [B, C, H, W].

        Returns two tensors [B, 1, 1, ...] with the device and dtype of x.
        Raises ValueError for a t that is not a timestep of this schedule, see `check_timesteps`.
        """
        check_timesteps(t, len(self))
        return self._alpha_table(t, x), self._sigma_table(t, x)


class TimestepTable:
    """A quantity that depends on the timestep, such as alpha_t, to be looked up for a batch of t.

    values: its values at all T timesteps, float64 [T] on the CPU.

    The copy for a device and a dtype is made at its first use and kept, so that later lookups on a
    GPU transfer nothing.
    """

    def __init__(self, values: torch.Tensor):
        self.values = values
        self._copies = {}               # (device, dtype) → tensor [T]

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The values at timesteps t [B], as [B, 1, 1, ...] with the device and dtype of x."""
        key = (x.device, x.dtype)
        if key not in self._copies:
            # Converted on the CPU: Apple's GPU has no float64.
            self._copies[key] = self.values.to(x.dtype).to(x.device)
        values = self._copies[key][t.to(x.device)]
        return values.view(-1, *(1,) * (x.ndim - 1))


def check_timesteps(t: torch.Tensor, num_timesteps: int) -> None:
    """Raise ValueError unless t [B] holds integers from 0 to num_timesteps - 1.

    The range is checked for a t on the CPU only, and not under torch.compile: on a GPU the check
    would be a synchronization. There CUDA reports an index that is out of range.
    """
    on_cpu = t.device.type == "cpu" and not torch.compiler.is_compiling()
    if t.is_floating_point() or (on_cpu and (t.min() < 0 or t.max() >= num_timesteps)):
        raise ValueError(
            f"timesteps must be integers from 0 to {num_timesteps - 1}, "
            f"not {t.dtype} from {t.min():.4g} to {t.max():.4g}"
        )
