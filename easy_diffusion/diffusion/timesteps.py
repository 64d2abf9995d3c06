"""TODO."""

import torch


def uniform_timesteps(batch: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Each timestep 0 … steps - 1 as likely; int64 [batch], where the generator lives."""
    return torch.randint(steps, (batch,), generator=generator, device=generator.device)


def logit_normal_timesteps(batch: int, steps: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.2) -> torch.Tensor:
    """Training timesteps t = steps · sigmoid(N(mean, deviation²)): most often in the middle, where there is most to learn.

    (Esser et al., "Scaling Rectified Flow Transformers", 2024, section 3.1.) int64 [batch], where the generator lives.
    """
    normal = torch.randn(batch, generator=generator, device=generator.device)
    return (torch.sigmoid(mean + std * normal) * steps).long().clamp(max=steps - 1)


class ImportanceTimesteps:
    """Timesteps drawn as often as their share of the bound's noise asks: p_t ∝ sqrt(E[L_t²]), each loss divided by T p_t, so
    that the mean stays what it is and its variance falls (Nichol & Dhariwal 2021, eq. 18). Made for the bound, see `vlb`.

    Until each t has been drawn `history` times, all are as likely. train() calls it for the timesteps, asks for their `weights`, and tells
    it what the losses were, to `remember`.
    """

    def __init__(self, steps: int, history: int = 10):
        self.losses, self.history = torch.zeros(steps, history, dtype=torch.float64), history
        self.counts = torch.zeros(steps, dtype=torch.int64)

    def probabilities(self) -> torch.Tensor:
        """p_t, float64 [T]; a thousandth of it is shared by all, so that none is forgotten."""
        steps = len(self.losses)
        if (self.counts < self.history).any():
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        size = self.losses.square().mean(dim=1).sqrt()
        return 0.999 * size / size.sum() + 0.001 / steps

    def __call__(self, batch: int, steps: int, generator: torch.Generator) -> torch.Tensor:
        if steps != len(self.losses):
            raise ValueError(f"these are timesteps of a schedule of {len(self.losses)}, not of {steps}")
        return torch.multinomial(self.probabilities().to(generator.device), batch, replacement=True, generator=generator)

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """1 / (T p_t) of timesteps t [B], float64 [B]."""
        return 1 / (len(self.losses) * self.probabilities()[t.cpu()])

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """The losses [B] at timesteps t [B], for the next draw."""
        for step, loss in zip(t.tolist(), losses.detach().tolist()):
            self.losses[step, self.counts[step] % self.history] = loss
            self.counts[step] += 1

    def reweight(self, t: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """losses [B] at timesteps t [B], each divided by T p_t; they are remembered for the next draw."""
        weights = self.weights(t)
        self.update(t, losses)
        return losses * weights.to(losses)

    def state_dict(self) -> dict:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        self.losses, self.counts = state["losses"], state["counts"]


def uniform_time(batch: int, steps: int, generator: torch.Generator, least: float = 1e-3) -> torch.Tensor:
    """Training times, float [batch] in [least, 1), where the generator lives. `steps` is not used: time is continuous."""
    return least + (1 - least) * torch.rand(batch, generator=generator, device=generator.device)


def logit_normal_time(batch: int, steps: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """Training times sigmoid(N(mean, deviation²)), float [batch]: most often in the middle, where the velocity is hardest to tell
    (Esser et al., "Scaling Rectified Flow Transformers", 2024, section 3.1). `steps` is not used: time is continuous."""
    return torch.sigmoid(mean + std * torch.randn(batch, generator=generator, device=generator.device))
