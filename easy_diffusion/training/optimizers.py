"""What every training run has around its step: precision, optimizers and their rates, a moving average, a clock, checkpoints.

    rate     of step i:  peak · min(1, (i + 1) / warmup) · min(1, (1 - progress) / decay)
    average  ema ← ema + (1 - d) (weights - ema),  d = min(`ema`, (1 + i) / (10 + i))      (Ho et al. 2020, appendix B)
    several  the gradient of W processes is the mean of theirs, so they learn as one process with a batch W times as large

accelerate knows the device, the precision and the other processes. The file needs torch and accelerate and, beside it, checkpoint.py and
muon.py.

>>> layer = torch.nn.Linear(4, 4)
>>> (adamw, peak), (muon, muon_peak) = optimizers_of(list(layer.parameters()), 1e-3, muon_learning_rate=2e-3)
>>> set_rates([(adamw, peak), (muon, muon_peak)], factor=0.5)
>>> [group["lr"] for optimizer in (adamw, muon) for group in optimizer.param_groups]
[0.0005, 0.001]
>>> clock = Clock(steps=4)
>>> for _ in range(3): clock.tick(pictures=8)
>>> clock.progress, clock.lr_multiplier(warmup=10, decay=0.5)
(0.75, 0.2)
"""

import statistics

import torch

from .muon import Muon


def build_optimizers(weights, learning_rate: float, muon_learning_rate: float | None = None, weight_decay: float = 0.01) -> list[tuple]:
    """[(AdamW, its peak rate)], or, with muon_learning_rate, AdamW for biases and scales and Muon for matrices, each with its peak rate."""
    matrices = [weight for weight in weights if weight.ndim > 1] if muon_learning_rate else []
    others = [weight for weight in weights if weight.ndim < 2] if muon_learning_rate else weights
    adamw = torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    if not matrices:
        return [(adamw, learning_rate)]
    return [(adamw, learning_rate), (Muon(matrices, muon_learning_rate, weight_decay=weight_decay), muon_learning_rate)]


def set_learning_rates(optimizers: list[tuple], factor: float) -> None:
    """Each optimizer's rate becomes `factor` times its peak."""
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * peak


def clip_grad_norm(weights, norm: float, clip: float) -> None:
    """Gradients of the length `norm` all together become `clip` long, if they are longer; most are not, and then nothing is touched."""
    if norm > clip:
        torch.nn.utils.clip_grads_with_norm_(weights, clip, torch.tensor(norm))


def has_plateaued(losses: list[float], window: int) -> bool:
    """Whether the mean of the last `window` losses is not below that of the window before by more than its standard error."""
    if len(losses) < 2 * window:
        return False
    last, before = losses[-window:], losses[-2 * window:-window]
    error = ((statistics.variance(last) + statistics.variance(before)) / window) ** 0.5
    return statistics.fmean(before) - statistics.fmean(last) < error
