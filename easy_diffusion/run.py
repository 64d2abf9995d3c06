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
>>> clock.progress, clock.factor(warmup=10, decay=0.5)
(0.75, 0.2)
"""

import contextlib
import time
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast

from . import checkpoint as files
from .muon import Muon


def fast_precision() -> str:
    """What accelerate calls mixed_precision: "bf16" where this machine computes bfloat16 in hardware, else "no"."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has = [getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if any(has) else "no"


def default_accelerator() -> Accelerator:
    """An Accelerator of the fast precision; where this process has made one before, of that one's: it has only one."""
    return Accelerator(mixed_precision=None if AcceleratorState._shared_state else fast_precision())


def optimizers_of(weights, learning_rate: float, muon_learning_rate: float | None = None, weight_decay: float = 0.01) -> list[tuple]:
    """[(AdamW, its peak rate)], or, with muon_learning_rate, AdamW for biases and scales and Muon for matrices, each with its peak rate."""
    matrices = [weight for weight in weights if weight.ndim > 1] if muon_learning_rate else []
    others = [weight for weight in weights if weight.ndim < 2] if muon_learning_rate else weights
    adamw = torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    if not matrices:
        return [(adamw, learning_rate)]
    return [(adamw, learning_rate), (Muon(matrices, muon_learning_rate, weight_decay=weight_decay), muon_learning_rate)]


def set_rates(optimizers: list[tuple], factor: float) -> None:
    """Each optimizer's rate becomes `factor` times its peak."""
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * peak


@torch.no_grad()
def follow(average, models, index: int, ema: float) -> None:
    """The average moves towards the weights, quickly in the first steps."""
    share = 1 - min(ema, (1 + index) / (10 + index))
    torch._foreach_lerp_(list(average.parameters()), [weight.detach() for weight in models.parameters()], share)


def shorten(weights, norm: float, clip: float) -> None:
    """Gradients of the length `norm` all together become `clip` long, if they are longer; most are not, and then nothing is touched."""
    if norm > clip:
        torch.nn.utils.clip_grads_with_norm_(weights, clip, torch.tensor(norm))


class Clock:
    """How far a run is, in steps and in seconds. What the caller does between two steps is no training time; what was before a break is."""

    def __init__(self, steps: int, minutes: float | None = None, save_seconds: float = 30):
        """Raises ValueError for no steps and no time."""
        if steps < 1 or (minutes is not None and minutes <= 0):
            raise ValueError(f"a training takes at least a step and some time, not steps={steps}, minutes={minutes}")
        self.steps, self.minutes, self.save_seconds = steps, minutes, save_seconds
        self.start()

    def start(self, index: int = 0, seconds: float = 0.0) -> None:
        """It begins now; index, seconds: of a run that goes on."""
        self.index, self.seconds, self.before, self.saved_at = index, seconds, seconds, seconds
        self.seen, self.started = 0, time.perf_counter()

    @property
    def progress(self) -> float:
        """From 0 to 1, of the steps or of the minutes, whichever is further."""
        return min(max(self.index / self.steps, self.seconds / (60 * self.minutes) if self.minutes else 0.0), 1.0)

    @property
    def pictures_per_second(self) -> float:
        return self.seen / max(self.seconds - self.before, 1e-9)

    def factor(self, warmup: int, decay: float) -> float:
        """By how much a rate is below its peak. decay: the share of the run over which it falls to zero."""
        return min(1, (self.index + 1) / max(warmup, 1)) * min(1, (1 - self.progress) / max(decay, 1e-9))

    def now(self) -> float:
        """Seconds of training so far."""
        return self.before + time.perf_counter() - self.started

    def tick(self, pictures: int, seconds: float | None = None) -> None:
        """A step is done. seconds: what it is by the common clock of several processes, else by this one's."""
        self.index, self.seen, self.seconds = self.index + 1, self.seen + pictures, self.now() if seconds is None else seconds

    def time_to_save(self) -> bool:
        """Whether save_seconds have passed since this last was so."""
        due = self.seconds - self.saved_at > self.save_seconds
        self.saved_at = self.seconds if due else self.saved_at
        return due

    @contextlib.contextmanager
    def stopped(self):
        """What is done inside takes no time."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused


def tell(accelerator, sentence: str) -> str:
    """The sentence, which the first process also says as a warning."""
    if sentence and accelerator.is_main_process:
        warnings.warn(sentence, stacklevel=3)
    return sentence


def why(guard, optimizers: list[tuple], checkpoint) -> str:
    """Why a run is given up, and what there is to do."""
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint is not None and Path(checkpoint).exists() else "there is no checkpoint"
    rates = " and ".join(f"{peak:g}" for _, peak in optimizers)
    return f"{guard.verdict()}; lower learning rates than {rates} may help; {kept}"


def save(path, tree, keep: int = 1, best: bool = False) -> str:
    """A checkpoint; "" or, if the disk would not take it, a sentence that says so: what was there before is still there. Where nothing
    could ever be written, that is an error (OSError). best: it is the best so far, kept as path.best if any but the newest are."""
    try:
        files.save(path, tree, keep, best=keep > 1 and (best or not Path(f"{path}.best").exists()))
        return ""
    except OSError as error:
        if not Path(path).exists():
            raise
        step = tree["index"] - 1
        return f"the checkpoint after step {step} could not be written, that of before stays, and the training goes on: {error}"


def check(path, saved, optimizers: list, predicts: str, pictures: int | None) -> None:
    """Whether a checkpoint of a training is of one like this; if not, ValueError says what was otherwise. pictures: of a step, in all
    processes, where that is known: with others the order would go on at another place."""
    if not isinstance(saved, dict) or "guard" not in saved:
        raise ValueError(f"{path} is not of a training by this file, or of one by an earlier version")
    if len(saved["optimizers"]) != len(optimizers):
        was = "with" if len(optimizers) == 1 else "without"
        raise ValueError(f"{path} was trained {was} Muon, so muon_learning_rate must tell the same")
    if saved["predicts"] != predicts:
        raise ValueError(f"{path} was trained to predict {saved['predicts']}, not {predicts}")
    if (was := saved.get("pictures")) is not None and pictures is not None and was != pictures:
        raise ValueError(f"{path} is of a run with {was} pictures a step, not {pictures}: to go on, it must be as many")


def all_at(accelerator, path, index: int) -> None:
    """Whether all processes go on at the same step; if not, ValueError."""
    if accelerator.num_processes > 1:
        total = accelerator.reduce(torch.tensor(index, device=accelerator.device), "sum")
        if anywhere(accelerator, int(total) != index * accelerator.num_processes):
            raise ValueError(f"this process goes on from step {index}, others from another: {path} must lie on a disk that all of them see")


def begin_alike(accelerator, modules) -> None:
    """All processes take the first one's numbers."""
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for tensor in modules.state_dict().values():
                tensor.copy_(broadcast(tensor))


def average_gradients(accelerator, weights) -> None:
    """Each gradient becomes the mean over all processes, in one message. That comes after all of them have been computed, so that a process
    which runs out of memory on the way can say so before the others wait for it."""
    if accelerator.num_processes > 1:
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for weight, part in zip(weights, mean.split([weight.numel() for weight in weights])):
            weight.grad = part.view_as(weight)


def anywhere(accelerator, true: bool) -> bool:
    """Whether it is true in any process."""
    if accelerator.num_processes == 1:
        return true
    return bool(accelerator.reduce(torch.tensor(float(true), device=accelerator.device), "sum"))


def in_common(accelerator, loss: torch.Tensor, norm: torch.Tensor, seconds: float) -> tuple[float, float, float]:
    """Loss and gradient's length as numbers, the mean over all processes, and the first one's clock, so that all of them decide alike.
    (While the first one's caller looks at samples its clock stands; the others wait.)"""
    loss, norm = torch.stack([loss.float(), norm.float()]).tolist()
    if accelerator.num_processes > 1:
        seconds *= accelerator.num_processes * accelerator.is_main_process
        loss, norm, seconds = accelerator.reduce(torch.tensor([loss, norm, seconds], device=accelerator.device), "mean").tolist()
    return loss, norm, seconds
