"""Optimizers, their learning rates, gradient clipping, and the test for a plateau.

AdamW trains all parameters; or Muon trains the matrices and AdamW the rest. Each optimizer is
paired with its peak learning rate eta. At step i its learning rate is

    eta_i = eta · lr_multiplier        from 0 to 1: TrainingClock.lr_multiplier in clock.py

A gradient g of all parameters whose norm exceeds c is clipped to g ← c g / |g|.

Training has plateaued if the mean loss of the last n steps is not below the mean of the n steps
before by more than the standard error of the difference, with s² the sample variances:

    mean_previous - mean_recent < sqrt((s²_previous + s²_recent) / n)

SGD with a tiny learning rate then takes over, see `OptimizerPhases`. The file needs torch and,
beside it, cuda_graphs.py and muon.py.

>>> layer = torch.nn.Linear(4, 4)
>>> optimizers = build_optimizers(list(layer.parameters()), 1e-3, muon_learning_rate=2e-3)
>>> [(type(optimizer).__name__, peak) for optimizer, peak in optimizers]
[('AdamW', 0.001), ('Muon', 0.002)]
>>> set_learning_rates(optimizers, lr_multiplier=0.5)
>>> [optimizer.param_groups[0]["lr"] for optimizer, _ in optimizers]
[0.0005, 0.001]
>>> has_plateaued([0.5, 0.4, 0.3, 0.2], window=2), has_plateaued([0.2, 0.3, 0.2, 0.3], window=2)
(False, True)
"""

import math
import statistics

import torch

from .cuda_graphs import CudaGraphs
from .muon import Muon, orthogonalize_all


def build_optimizers(
    parameters,
    learning_rate: float,
    muon_learning_rate: float | None = None,
    weight_decay: float = 0.01,
) -> list[tuple[torch.optim.Optimizer, float]]:
    """AdamW and, with a `muon_learning_rate`, Muon; each with its peak learning rate.

    An optimizer that would have nothing to train is left out.

    parameters: list of the parameters to train.
    learning_rate: AdamW's peak learning rate.
    muon_learning_rate: if given, Muon trains the parameters of two or more dimensions.
    weight_decay: of both optimizers.
    """
    matrices = []
    others = parameters
    if muon_learning_rate:
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim < 2]
    optimizers = []
    if others or not matrices:
        adamw = torch.optim.AdamW(
            others, learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        optimizers.append((adamw, learning_rate))
    if matrices:
        muon = Muon(matrices, muon_learning_rate, weight_decay=weight_decay)
        optimizers.append((muon, muon_learning_rate))
    return optimizers


def record_orthogonalize_all(device):
    """Muon's `orthogonalize_all`, as a CUDA graph on the device."""
    graphs = CudaGraphs(lambda named: orthogonalize_all(list(named.values())), device)
    return lambda tensors: graphs(dict(enumerate(tensors)))


def set_learning_rates(optimizers: list[tuple], lr_multiplier: float) -> None:
    """Set the learning rate of each (optimizer, peak) to `lr_multiplier` times its peak."""
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_multiplier * peak


def compute_grad_norm(parameters) -> torch.Tensor:
    """Return the norm of the gradient of all parameters, a scalar."""
    return torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    )


def clip_grad_norm(parameters, norm: float, max_norm: float) -> None:
    """Scale the gradients in place so that their total norm is at most `max_norm`.

    `norm` is the total norm, which the caller has computed already. Gradients that are short
    enough, as most are, are not touched.
    """
    if norm > max_norm:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        scale = max_norm / (torch.tensor(norm) + 1e-6)          # in float32, as torch computes it
        torch._foreach_mul_(gradients, scale.item())


def is_fp16_overflow(loss: float, norm: float, scaler) -> bool:
    """Return whether the scale of the loss, not the loss itself, made the gradient overflow.

    loss: of the batch. norm: of its gradient. scaler: a torch.amp.GradScaler.

    fp16 ends at 65504. The scale keeps small gradients above 0, but may lift large ones over that
    end. Only while it is above 1 is there anything to lower: a gradient that is not finite at the
    scale 1, that of every other precision, is the training's own fault.
    """
    return math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() > 1


def descend(
    loss: torch.Tensor, parameters, optimizers: list[tuple], clip: float, index: int, scaler=None
) -> float:
    """Step all optimizers along the gradient of a loss, its norm clipped; return the loss.

    parameters: list of the parameters that the optimizers train; other gradients are left alone.
    optimizers: pairs (optimizer, peak learning rate).
    clip: maximum norm of the gradient.
    index: of the training step, for the message.
    scaler: a torch.amp.GradScaler, which fp16 needs. If its scale makes the gradient overflow, no
        weight changes and the scale is lowered.

    Raises FloatingPointError, and changes no weight, if the loss or the norm is not finite.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    for parameter in parameters:
        parameter.grad = None
    scaler.scale(loss).backward()
    for optimizer, _ in optimizers:
        scaler.unscale_(optimizer)
    norm = compute_grad_norm(parameters)
    loss, norm = torch.stack([loss.detach().float(), norm.float()]).tolist()
    if is_fp16_overflow(loss, norm, scaler):
        scaler.update()         # it lowers the scale
        return loss
    if not (math.isfinite(loss) and math.isfinite(norm)):
        peaks = " and ".join(f"{peak:g}" for _, peak in optimizers)
        raise FloatingPointError(
            f"the loss is {loss} and the norm of its gradient is {norm} at step {index}; "
            f"try lower learning rates than {peaks}"
        )
    clip_grad_norm(parameters, norm, clip)
    for optimizer, _ in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return loss


def has_plateaued(losses: list[float], window: int) -> bool:
    """Whether the loss has stopped falling; see the test at the top of the file.

    losses: the losses of all steps, oldest first.
    window: the number n of steps in each of the two windows; with fewer than 2 n losses: False.
    """
    if len(losses) < 2 * window:
        return False
    recent = losses[-window:]
    previous = losses[-2 * window:-window]
    error = ((statistics.variance(recent) + statistics.variance(previous)) / window) ** 0.5
    return statistics.fmean(previous) - statistics.fmean(recent) < error


class OptimizerPhases:
    """AdamW, with or without Muon; and SGD, which fine-tunes once the loss has plateaued.

    The first version of this project trained so: with a tiny constant learning rate, SGD moves the
    weights little from where AdamW has left them. Notebook 17 measures it: on the demo it does not
    help, and a decay of AdamW's learning rate to zero, which needs no test for a plateau, does
    better. The decay applies to AdamW and Muon alone; a plateau before the end cuts it short.

    parameters: list of the parameters to train.
    optimizer: OptimizerOptions.
    plateau: PlateauOptions.

    The attributes `phase`, "adamw" or "sgd", and `adamw`, a list of pairs (optimizer, peak learning
    rate), are what a checkpoint holds. SGD without momentum has no state.
    """

    def __init__(self, parameters, optimizer, plateau):
        self.adamw = build_optimizers(
            parameters,
            optimizer.learning_rate,
            optimizer.muon_learning_rate,
            optimizer.weight_decay,
        )
        self.sgd = [
            (torch.optim.SGD(parameters, plateau.sgd_learning_rate), plateau.sgd_learning_rate)
        ]
        self.phase = plateau.phase
        self.plateau = plateau

    def record_graphs(self, device) -> None:
        """Let Muon replay its iteration as a CUDA graph."""
        for optimizer, _ in self.adamw:
            if isinstance(optimizer, Muon):
                optimizer.orthogonalize_all = record_orthogonalize_all(device)

    @property
    def current(self) -> list[torch.optim.Optimizer]:
        """The optimizers of the phase."""
        pairs = self.adamw if self.phase == "adamw" else self.sgd
        return [optimizer for optimizer, _ in pairs]

    def set_learning_rates(self, lr_multiplier: float, lr_scale: float) -> float:
        """Set all learning rates; return that of the phase's first optimizer.

        lr_multiplier: of AdamW and Muon alone, from warm-up and decay.
        lr_scale: of all optimizers.
        """
        set_learning_rates(self.adamw, lr_multiplier * lr_scale)
        set_learning_rates(self.sgd, lr_scale)
        return self.current[0].param_groups[0]["lr"]

    def check_plateau(self, losses: list[float], index: int) -> str:
        """After every 100 steps, change to SGD if the loss has plateaued; return a note, or "".

        losses: of all steps taken.
        index: number of finished steps.
        """
        if self.phase == "sgd" or index % 100 != 0:
            return ""
        if not self.plateau.plateaued(losses, self.plateau.window):
            return ""
        self.phase = "sgd"
        return (
            f"training has plateaued after step {index - 1}: "
            f"SGD at {self.plateau.sgd_learning_rate:g} takes over from AdamW"
        )
